"""Messages as one batch of rows for a stateful operator: only the columns that it reads, and which message each row is of.

:func:`schemas.rows.rows` does it for every type; readings, which come in thousands of single rows, have a shorter way here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from schemas.messages import Array, Column, Message, Readings
from schemas.rows import concat, rows

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(slots=True)
class Batch:
    """n rows.

    :param lengths: rows of each message.
    :param source: of each row, or of each message where ``by_message``.
    :param readings: all messages are readings: the ledger counts their rows.
    """

    n: int
    columns: dict[str, Column]
    time: NDArray[np.int64]
    source: list[str]
    by_message: bool
    lengths: list[int]
    readings: bool

    def sources(self) -> list[str]:
        """The source of each row."""
        if not self.by_message or self.n == len(self.lengths):
            return self.source
        return [s for s, n in zip(self.source, self.lengths, strict=True) for _ in range(n)]


def gather(messages: Sequence[Message], fields: Iterable[str]) -> Batch:
    """The rows of ``messages`` with these columns, where they have them."""
    bodies = [message.body for message in messages]
    if set(map(type, bodies)) != {Readings}:
        return _any(messages, fields)
    readings = cast("list[Readings]", bodies)
    if len(readings) == 1:
        body, message = readings[0], messages[0]
        time = np.full(body.n, message.time, np.int64) if body.time is None else body.time
        by_message = body.source is None
        source = [message.source] if body.source is None else body.source
        columns = {name: body.columns[name] for name in fields if name in body.columns}
        return Batch(body.n, columns, time, source, by_message, [body.n], True)
    lengths = [b.n for b in readings]
    n = sum(lengths)
    columns = {}
    for name in fields:
        parts = [b.columns.get(name) for b in readings]
        if (column := _column(parts, lengths)) is not None:
            columns[name] = column
    owners = [b.source for b in readings]
    by_message = set(map(type, owners)) == {type(None)}
    if by_message:
        source = [m.source for m in messages]
    else:
        source = []
        for message, owner, length in zip(messages, owners, lengths, strict=True):
            source.extend([message.source] * length if owner is None else owner)
    return Batch(n, columns, _times(messages, readings, lengths, n), source, by_message, lengths, True)


def _column(parts: list[Column | None], lengths: list[int]) -> Column | None:
    kinds = set(map(type, parts))
    if kinds == {np.ndarray}:
        return np.concatenate(cast("list[Array]", parts))
    if kinds == {type(None)}:
        return None
    return concat(parts, lengths)


def _times(messages: Sequence[Message], bodies: list[Readings], lengths: list[int], n: int) -> NDArray[np.int64]:
    own = [b.time for b in bodies]
    if set(map(type, own)) == {type(None)}:
        times = np.array([m.time for m in messages], np.int64)
        return times if n == len(messages) == lengths.count(1) else np.repeat(times, lengths)
    parts = [
        np.full(length, m.time, np.int64) if time is None else time
        for m, time, length in zip(messages, own, lengths, strict=True)
    ]
    return np.concatenate(parts).astype(np.int64, copy=False)


def _any(messages: Sequence[Message], fields: Iterable[str]) -> Batch:
    whole = rows(messages)
    columns = {name: whole.columns[name] for name in fields if name in whole.columns}
    lengths = np.bincount(whole.message, minlength=len(messages)).tolist()
    return Batch(whole.n, columns, whole.time, whole.source, False, lengths, False)
