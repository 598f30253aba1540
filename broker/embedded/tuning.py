"""What suits a process that does nothing but serve a broker: memory and garbage."""

from __future__ import annotations

import contextlib
import ctypes
import gc

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_FROM = 32 << 20
_TRIM_FROM = 64 << 20


def tune() -> None:
    """Settle the process, once all is imported.

    A large message is a new piece of memory for each read and each copy. Left alone, glibc fetches each from the system and
    gives it back, and touching fresh pages costs more than all the copying; so it is told to keep up to 64 MB.
    Another C library is left as it is.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MMAP_FROM)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_FROM)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)  # what a broker holds are messages: no cycles, and many of them
