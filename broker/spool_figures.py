"""What a spool gives and tells: its items, its books, and why it takes no more."""

from __future__ import annotations

import msgspec

from schemas.errors import BusError


class Item(msgspec.Struct, frozen=True, gc=False):
    """One message in the store. ``number`` grows by one with each message stored, and is never used again.

    :param weight: what the writer counts it as (rows, say).
    """

    number: int
    topic: str
    payload: bytes
    weight: int = 1


class Count(msgspec.Struct, frozen=True):
    """Messages, bytes of their topics and payloads, and their weights together."""

    messages: int = 0
    bytes: int = 0
    weight: int = 0


class Run(msgspec.Struct, frozen=True):
    """Messages ``first`` to ``last``, those of them that are here: how many, and their weights together."""

    first: int
    last: int
    messages: int
    weight: int


class Figures(msgspec.Struct, frozen=True):
    """The books since the store was made. ``stored == kept + removed + evicted + damaged`` in messages.

    :param stored: messages that were taken in.
    :param kept: what is here now.
    :param removed: taken out by :meth:`~broker.spool.Spool.remove`.
    :param evicted: dropped by ``drop-oldest``.
    :param refused: dropped by ``drop-newest``, or larger than the whole budget.
    :param damaged: messages that were stored and that the disk did not give back.
    :param disk: bytes that the files have now.
    """

    stored: int
    kept: Count
    removed: Count
    evicted: Count
    refused: Count
    damaged: int
    disk: int


class NoRoomError(BusError):
    """The disk refuses to take more. What is stored is kept; try again when there is room."""
