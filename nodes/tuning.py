"""What a process wants of Python and of the C library in which an operator works in threads, or takes part in a federated job."""

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
GIVEN_BACK = 256 * 1024
"""Bytes of a block from which on it goes back to the system when it is freed. Left alone, the C library raises that to the
largest block that it has seen freed; then what a round needs for a moment stays, in pieces."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_threads = False


def for_threads() -> None:
    """Set both, for the whole process; may be called again."""
    global _threads
    _threads = True
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH))
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, KEPT)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * KEPT)


def to_give_back() -> None:
    """Large blocks that are freed go back to the system, in the whole process; unless :func:`for_threads` wants them kept."""
    if _threads:
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, GIVEN_BACK)
        library.mallopt(_M_TRIM_THRESHOLD, 4 * GIVEN_BACK)
