"""What the C library does with large pieces of memory that are freed."""

from __future__ import annotations

import contextlib
import ctypes

KEPT = 32 << 20
"""Bytes of a block up to which freed memory is used again, and half of what is kept of it. The library takes no larger one."""
GIVEN_BACK = 256 << 10
"""Bytes of a block from which on it goes back to the system where that is asked for. Left alone, the C library raises that
to the largest block that it has seen freed; then what a round needs for a moment stays, in pieces."""
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(KEPT), "MALLOC_TRIM_THRESHOLD_": str(2 * KEPT)}
"""The same as :func:`keep_freed` for a program that is started with it (mosquitto)."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


_settled = 0
_thrifty = False


def keep_freed(most: int = KEPT) -> None:
    """Have blocks of up to ``most`` bytes used again, for the whole process; what was asked for before stays, if it is more.

    Whoever works on large messages has a new piece of memory for each. Left alone, glibc gives each back to the system and
    fetches the next from there as zeroed pages one by one, and touching these costs more than all the copying.
    Another C library is left as it is.

    After :func:`give_back` only who asks for :data:`KEPT` gets it: whoever works on frames all the time, not whom a large
    message happens to reach.
    """
    global _settled
    if most <= _settled or (_thrifty and most < KEPT):
        return
    _settled = most
    _set(most, 2 * most)


def give_back() -> None:
    """Large blocks that are freed go back to the system, in the whole process; unless :data:`KEPT` was asked for."""
    global _thrifty
    _thrifty = True
    if _settled < KEPT:
        _set(GIVEN_BACK, 4 * GIVEN_BACK)


def _set(block: int, trim: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, block)
        mallopt(_M_TRIM_THRESHOLD, trim)
