"""What is said of a spool, in a topology and to the store itself: :mod:`broker.spool` says what it means."""

from __future__ import annotations

from typing import Literal, TypeAlias

Overflow: TypeAlias = Literal["drop-oldest", "drop-newest", "block"]
Order: TypeAlias = Literal["oldest", "newest"]
LEAST = 128 * 1024
"""Smallest budget, bytes."""
