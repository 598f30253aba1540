"""Another wall clock for this process: what its Python code reads as the time of day, moved by an offset.

The machine's clock is not touched, and Linux has no namespace for the time of day. So this reaches everything that asks
Python's ``time`` module, as all of Penstock does; it does not reach ``datetime.now()`` and what C libraries ask themselves.
"""

from __future__ import annotations

import time

_offset = 0
_true = time.time
_true_ns = time.time_ns
_true_read = time.clock_gettime
_true_read_ns = time.clock_gettime_ns


def move(offset: int) -> None:
    """The time of day is ``offset`` ns from the machine's, from now on; 0: the machine's again. Called in a worker."""
    global _offset
    _offset = offset
    moved = bool(offset)
    time.time_ns = _time_ns if moved else _true_ns
    time.time = _time if moved else _true
    time.clock_gettime_ns = _read_ns if moved else _true_read_ns
    time.clock_gettime = _read if moved else _true_read


def _time_ns() -> int:
    return _true_ns() + _offset


def _time() -> float:
    return _time_ns() / 1e9


def _read_ns(clock: int, /) -> int:
    return _true_read_ns(clock) + (_offset if clock == time.CLOCK_REALTIME else 0)


def _read(clock: int, /) -> float:
    return _read_ns(clock) / 1e9
