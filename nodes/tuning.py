"""What a process in which an operator works in threads (a model) wants of Python and of the C library."""

from __future__ import annotations

import sys

from broker.memory import keep_freed

SWITCH = 0.0001
"""Seconds after which Python takes the interpreter from a thread that another waits for: at its usual 5 ms a model waits
longer to go on than it takes to answer."""


def for_threads() -> None:
    """For the whole process; may be called again.

    Batches of frames come and go in blocks of about a megabyte; that they are used again was worth 5 to 9 % with a float
    model of 96×96 colour images.
    """
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH))
    keep_freed()
