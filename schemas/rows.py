"""Bodies as rows: what aggregates, reading steps and sinks work on, whatever the messages' types.

One message or a list of them becomes one :class:`Rows`: columns over all rows, the event time and the source of each row
and which message it came from. Columns are numpy arrays or lists of texts, as in :class:`~schemas.messages.Readings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from schemas.messages import Aggregate, Array, Column, Event, Message, Predictions, Readings, Scalar

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROW_TYPES = frozenset({"readings/1", "predictions/1", "aggregate/1", "event/1"})
"""Types that can be seen as rows."""


@dataclass(slots=True)
class Rows:
    """n rows as columns.

    :param time: int64 [n], ns since the epoch.
    :param source: [n] device of each row.
    :param message: int64 [n], index of the message that the row came from.
    """

    n: int
    columns: dict[str, Column]
    time: NDArray[np.int64]
    source: list[str]
    message: NDArray[np.int64]


def length(column: Column) -> int:
    """Rows of a column."""
    return len(column)


def take(column: Column, index: Array) -> Column:
    """The rows that a boolean mask or an index array picks."""
    if isinstance(column, list):
        positions = np.flatnonzero(index) if index.dtype == np.bool_ else index
        return [column[i] for i in positions.tolist()]
    return column[index]


def concat(columns: Sequence[Column | None], lengths: Sequence[int]) -> Column:
    """One below the other; None stands for a column that a part does not have (NaN, or None among texts)."""
    if any(isinstance(c, list) for c in columns):
        out: list[str | None] = []
        for column, n in zip(columns, lengths, strict=True):
            if column is None:
                out.extend([None] * n)
            elif isinstance(column, list):
                out.extend(column)
            else:
                out.extend(str(v) for v in column.tolist())
        return out
    parts = [np.full(n, np.nan) if c is None else np.asarray(c) for c, n in zip(columns, lengths, strict=True)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def from_scalars(values: Sequence[Scalar]) -> Column:
    """A column of single values: texts become a list, everything else an array (None → NaN)."""
    if any(isinstance(v, str) for v in values):
        return [None if v is None else str(v) for v in values]
    if values and all(isinstance(v, bool) for v in values):
        return np.array(values, np.bool_)
    if values and all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        try:
            return np.array(values, np.int64)
        except OverflowError:  # msgpack has unsigned ones beyond
            return np.array(values, np.float64)
    return np.array([np.nan if v is None else float(v) for v in values], np.float64)


def _expand(message: Message) -> tuple[int, dict[str, Column]]:
    """Rows and columns of one message that is not readings."""
    body = message.body
    if isinstance(body, Predictions):
        n = len(body.labels) if body.boxes is not None else 1
        columns: dict[str, Column] = {}
        if body.boxes is not None:
            columns["label"] = list(body.labels)
            columns["score"] = body.scores
            columns.update({name: body.boxes[:, i] for i, name in enumerate(("x0", "y0", "x1", "y1"))})
        elif body.labels:
            columns["label"] = [body.labels[0]]
            columns["score"] = body.scores[:1]
        if body.values is not None:
            for name, value in body.values.items():
                if value.size == 1 and n == 1:
                    columns[name] = value.reshape(1)
        scalars: dict[str, Scalar] = {
            **{f"known_{k}" if k in columns else k: v for k, v in body.attributes.items()},
            "model": body.model.name,
            "version": body.model.version,
        }
    elif isinstance(body, Aggregate):
        n, columns = 1, {}
        scalars = {
            **body.values,
            "key": body.key,
            "count": body.count,
            "start": body.window.start,
            "end": body.window.end,
        }
    elif isinstance(body, Event):
        n, columns = 1, {}
        scalars = {**body.values, "name": body.name, "severity": body.severity, "text": body.text}
    else:
        raise TypeError(f"{message.type} has no rows")
    for name, scalar in scalars.items():
        columns.setdefault(name, from_scalars([scalar] * n))
    return n, columns


def _alike(messages: Sequence[Message]) -> dict[str, Column] | None:
    """The columns of classifications that have the same attributes, one row each, all at once; None: they are not such.

    What :func:`_expand` and :func:`concat` would give, at a tenth of the price.
    """
    bodies = [message.body for message in messages]
    if set(map(type, bodies)) != {Predictions}:
        return None
    predictions = cast("list[Predictions]", bodies)
    names = predictions[0].attributes.keys()
    for body in predictions:
        if body.boxes is not None or body.values is not None or not body.labels or body.attributes.keys() != names:
            return None
    columns: dict[str, Column] = {
        "label": [body.labels[0] for body in predictions],
        "score": np.concatenate([body.scores[:1] for body in predictions]),
    }
    for name in names:
        values = [body.attributes[name] for body in predictions]
        if len(set(map(type, values))) != 1 or name in ("model", "version"):
            return None
        columns[f"known_{name}" if name in ("label", "score") else name] = from_scalars(values)
    columns["model"] = [body.model.name for body in predictions]
    columns["version"] = [body.model.version for body in predictions]
    return columns


def rows(messages: Sequence[Message]) -> Rows:
    """All rows of ``messages``, in order. A field that only some have is missing (NaN, None) in the others.

    A classification is one row with ``label`` and ``score`` (the best); a detection one row a box; attributes, aggregate
    values and event values are fields by their names. An attribute of what was seen whose name the answer has too
    is ``known_<name>``: a frame's known label stands beside the predicted one as ``known_label``.

    :raises TypeError: a message whose type has no rows (see :data:`ROW_TYPES`).
    """
    if len(messages) > 1 and (together := _alike(messages)) is not None:
        n = len(messages)
        moments = np.array([message.time for message in messages], np.int64)
        return Rows(n, together, moments, [message.source for message in messages], np.arange(n))
    lengths: list[int] = []
    tables: list[dict[str, Column]] = []
    times: list[Array] = []
    sources: list[str] = []
    for message in messages:
        body = message.body
        if isinstance(body, Readings):
            n, table = body.n, body.columns
            time = body.time
            sources.extend(body.source if body.source is not None else [message.source] * n)
        else:
            n, table = _expand(message)
            time = None
            sources.extend([message.source] * n)
        lengths.append(n)
        tables.append(table)
        times.append(np.full(n, message.time, np.int64) if time is None else time)
    if len(messages) == 1:
        return Rows(n, dict(table), times[0], sources, np.zeros(n, np.int64))
    names: dict[str, Any] = {}
    for table in tables:
        names.update(dict.fromkeys(table))
    columns = {name: concat([table.get(name) for table in tables], lengths) for name in names}
    return Rows(
        n=sum(lengths),
        columns=columns,
        time=np.concatenate(times) if times else np.zeros(0, np.int64),
        source=sources,
        message=np.repeat(np.arange(len(messages)), lengths),
    )
