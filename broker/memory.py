"""What the C library does with large pieces of memory that are freed."""

from __future__ import annotations

import contextlib
import ctypes

KEPT = 32 << 20
"""Bytes of a block up to which freed memory is used again, and half of what is kept of it. The library takes no larger one."""
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(KEPT), "MALLOC_TRIM_THRESHOLD_": str(2 * KEPT)}
"""The same for a program that is started with it (mosquitto)."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


_settled = 0


def keep_freed(most: int = KEPT) -> None:
    """Have blocks of up to ``most`` bytes used again, for the whole process; what was asked for before stays, if it is more.

    Whoever works on large messages has a new piece of memory for each. Left alone, glibc gives each back to the system and
    fetches the next from there as zeroed pages one by one, and touching these costs more than all the copying.
    Another C library is left as it is.
    """
    global _settled
    if most <= _settled:
        return
    _settled = most
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, most)
        mallopt(_M_TRIM_THRESHOLD, 2 * most)
