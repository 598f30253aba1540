"""What a process in which an operator works in threads (a model) wants of Python and of the C library."""

from __future__ import annotations

import contextlib
import ctypes
import sys

SWITCH = 0.0001
"""Seconds after which Python takes the interpreter from a thread that another waits for: at its usual 5 ms a model waits
longer to go on than it takes to answer."""
KEPT = 32 * 2**20
"""Bytes of a block up to which the C library uses freed memory again (and twice as many bytes of free memory that it keeps).
Batches of frames come and go in blocks of about a megabyte; each time given back to the system, they come as zeroed pages one by
one. With a float model of 96×96 colour images this was worth 5 to 9 %. The library takes no larger one."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def for_threads() -> None:
    """Set both, for the whole process; may be called again."""
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH))
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, KEPT)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * KEPT)
