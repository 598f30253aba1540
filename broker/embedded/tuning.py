"""What suits a process that does nothing but serve a broker: memory and garbage."""

from __future__ import annotations

import gc

from broker.memory import keep_freed


def tune() -> None:
    """Settle the process, once all is imported."""
    keep_freed()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)  # what a broker holds are messages: no cycles, and many of them
