"""Messages as one batch of rows for a stateful operator: only the columns that it reads, and which message each row is of.

:func:`schemas.rows.rows` does it for every type; readings, which come in thousands of single rows, have a shorter way here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.messages import Array, Column, Message, Readings
from schemas.rows import concat, rows


@dataclass(slots=True)
class Batch:
    """n rows.

    :param lengths: rows of each message.
    :param source: of each row, or of each message where ``by_message``.
    """

    n: int
    columns: dict[str, Column]
    time: NDArray[np.int64]
    source: list[str]
    by_message: bool
    lengths: list[int]

    def sources(self) -> list[str]:
        """The source of each row."""
        if not self.by_message or self.n == len(self.lengths):
            return self.source
        return [s for s, n in zip(self.source, self.lengths, strict=True) for _ in range(n)]


def gather(messages: Sequence[Message], fields: Iterable[str]) -> Batch:
    """The rows of ``messages`` with these columns, where they have them."""
    bodies: list[Readings] = []
    for message in messages:
        if type(message.body) is not Readings:
            return _any(messages, fields)
        bodies.append(message.body)
    if len(bodies) == 1:
        body, message = bodies[0], messages[0]
        time = np.full(body.n, message.time, np.int64) if body.time is None else body.time
        by_message = body.source is None
        source = [message.source] if body.source is None else body.source
        columns = {name: body.columns[name] for name in fields if name in body.columns}
        return Batch(body.n, columns, time, source, by_message, [body.n])
    lengths = [b.n for b in bodies]
    n = sum(lengths)
    columns = {}
    for name in fields:
        parts = [b.columns.get(name) for b in bodies]
        if (column := _column(parts, lengths)) is not None:
            columns[name] = column
    by_message = all(b.source is None for b in bodies)
    if by_message:
        source = [m.source for m in messages]
    else:
        source = []
        for message, body in zip(messages, bodies, strict=True):
            source.extend([message.source] * body.n if body.source is None else body.source)
    return Batch(n, columns, _times(messages, bodies, n), source, by_message, lengths)


def _column(parts: list[Column | None], lengths: list[int]) -> Column | None:
    if all(isinstance(p, np.ndarray) for p in parts):
        arrays: list[Array] = [p for p in parts if isinstance(p, np.ndarray)]
        return np.concatenate(arrays)
    if all(p is None for p in parts):
        return None
    return concat(parts, lengths)


def _times(messages: Sequence[Message], bodies: list[Readings], n: int) -> NDArray[np.int64]:
    if all(b.time is None for b in bodies):
        times = np.fromiter((m.time for m in messages), np.int64, len(messages))
        return (
            times if n == len(messages) and all(b.n == 1 for b in bodies) else np.repeat(times, [b.n for b in bodies])
        )
    return np.concatenate(
        [np.full(b.n, m.time, np.int64) if b.time is None else b.time for m, b in zip(messages, bodies, strict=True)]
    ).astype(np.int64, copy=False)


def _any(messages: Sequence[Message], fields: Iterable[str]) -> Batch:
    whole = rows(messages)
    columns = {name: whole.columns[name] for name in fields if name in whole.columns}
    lengths = np.bincount(whole.message, minlength=len(messages)).tolist()
    return Batch(whole.n, columns, whole.time, whole.source, False, lengths)
