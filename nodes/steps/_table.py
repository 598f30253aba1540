"""Rows of many messages as one table, so that steps work on columns, and back to one message for each.

Only messages of one and the same schema share a table: whether a field is there, and of which type, is then the same for
all of them, and no result depends on which messages happened to arrive together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import numpy as np

from nodes.operator import Emit
from nodes.steps._step import RefusedError, Step
from schemas.expressions import ExpressionError
from schemas.messages import Array, Column, Message, Predictions, Readings, rows_of
from schemas.rows import concat, rows, take

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Places:
    """Where rows stand in their messages. Worked out when somebody asks: most steps do not.

    :param lengths: rows of each message, one after the other.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths

    @cached_property
    def message(self) -> NDArray[np.int64]:
        """Per row, ascending, the index of its message."""
        return np.repeat(np.arange(len(self._lengths)), self._lengths)

    @cached_property
    def row(self) -> NDArray[np.int64]:
        """Per row its index within its message as it came."""
        message = self.message
        starts: NDArray[np.int64] = np.cumsum([0, *self._lengths[:-1]])
        return np.asarray(np.arange(len(message)) - starts[message])

    def bounds(self) -> list[int]:
        """Where each message's rows begin, and the end."""
        return [0, *accumulate(self._lengths)]

    def pick(self, keep: Array) -> Picked:
        """The rows where the mask is true."""
        return Picked(self.message[keep], self.row[keep], len(self._lengths))


class Picked(Places):
    """Some rows of some messages."""

    def __init__(self, message: NDArray[np.int64], row: NDArray[np.int64], count: int) -> None:
        super().__init__(np.bincount(message, minlength=count).tolist())
        self.message = message
        self.row = row


@dataclass(eq=False)  # not frozen: made for every message, and freezing doubles what that costs
class Table:
    """n rows of ``messages``.

    :param columns: field → column of n rows.
    :param clock: the event times of the rows, int64 [n], ns since the epoch; None: those of all rows of ``messages``.
    :param places: which message each row is of, and where it stood in it.
    :param changed: columns are not those of the messages any more.
    :param order: place of each message in the call.
    :param empties: messages that had no rows from the start go along.
    """

    messages: list[Message]
    order: list[int]
    n: int
    columns: dict[str, Column]
    clock: NDArray[np.int64] | None
    places: Places
    changed: bool = False
    empties: bool = True

    @cached_property
    def time(self) -> NDArray[np.int64]:
        """int64 [n], ns since the epoch. Put together when somebody asks: most steps do not."""
        return _times(self.messages) if self.clock is None else self.clock

    @cached_property
    def sources(self) -> tuple[NDArray[np.int64], list[str]]:
        """Per row the index of its source, and the sources' names."""
        names: dict[str, int] = {}
        if all(not isinstance(m.body, Readings) or m.body.source is None for m in self.messages):
            codes = np.array([names.setdefault(m.source, len(names)) for m in self.messages], np.int64)
            return codes[self.places.message], list(names)
        per_row = [names.setdefault(s, len(names)) for s in self.source]
        return np.array(per_row, np.int64), list(names)

    @cached_property
    def source(self) -> list[str]:
        """Per row its source."""
        out: list[str] = []
        for message, row in zip(self.places.message.tolist(), self.places.row.tolist(), strict=True):
            origin = self.messages[message]
            own = origin.body.source if isinstance(origin.body, Readings) else None
            out.append(origin.source if own is None else own[row])
        return out

    @property
    def names(self) -> Mapping[str, Column]:
        """The columns as expressions see them: with ``time`` and ``source`` where no field has the name."""
        return _Names(self)

    def pick(self, keep: Array) -> Table:
        """The rows where the mask is true."""
        kept = int(np.count_nonzero(keep))
        if kept == self.n:
            return self
        columns = {name: take(column, keep) for name, column in self.columns.items()}
        places = self.places.pick(keep)
        return Table(self.messages, self.order, kept, columns, self.time[keep], places, self.changed, self.empties)

    def with_columns(self, columns: dict[str, Column]) -> Table:
        """Other columns for the same rows."""
        return Table(self.messages, self.order, self.n, columns, self.clock, self.places, True, self.empties)

    def without_empty(self) -> Table:
        """Also without messages that had no rows from the start: no row of theirs was asked for."""
        return Table(
            self.messages, self.order, self.n, self.columns, self.clock, self.places, self.changed, empties=False
        )

    def bounds(self) -> list[int]:
        """Where each message's rows begin, and the end."""
        return self.places.bounds()

    def part(self, index: int) -> Table:
        """The rows of one message alone."""
        start, end = self.bounds()[index : index + 2]
        places = Picked(np.zeros(end - start, np.int64), self.places.row[start:end], 1)
        return Table(
            [self.messages[index]],
            [self.order[index]],
            end - start,
            {name: column[start:end] for name, column in self.columns.items()},
            self.time[start:end],
            places,
            self.changed,
            self.empties,
        )

    def split(self) -> list[tuple[int, Message]]:
        """(place in the call, message): one for each message of which rows are left, with its own id."""
        bounds = self.bounds()
        out: list[tuple[int, Message]] = []
        for i, (place, message) in enumerate(zip(self.order, self.messages, strict=True)):
            made = self._message(message, bounds[i], bounds[i + 1])
            if made is not None:
                out.append((place, made))
        return out

    def _message(self, message: Message, start: int, end: int) -> Message | None:
        body, n = message.body, end - start
        if n == 0 and not self.empties:
            return None
        if isinstance(body, Readings):
            if n == body.n and not self.changed:
                return message
            if n == 0 and body.n > 0:
                return None
            if n == body.n:
                time, source = body.time, body.source
            else:
                time = None if body.time is None else self.time[start:end]
                source = None if body.source is None else [body.source[i] for i in self.places.row[start:end].tolist()]
            columns = {name: column[start:end] for name, column in self.columns.items()}
            first = int(time[0]) if n and time is not None else message.time
            return message.derive(Readings(n=n, columns=columns, time=time, source=source), time=first)
        if n == 0:  # an answer without boxes has no rows from the start
            return message if isinstance(body, Predictions) and body.boxes is not None and not body.labels else None
        if isinstance(body, Predictions) and body.boxes is not None and n < len(body.labels):
            kept = self.places.row[start:end]
            return message.derive(
                Predictions(
                    model=body.model,
                    seen=body.seen,
                    labels=[body.labels[i] for i in kept.tolist()],
                    scores=body.scores[kept],
                    boxes=body.boxes[kept],
                    values=body.values,
                    times=body.times,
                    attributes=body.attributes,
                )
            )
        return message


class _Names(Mapping[str, Column]):
    def __init__(self, table: Table) -> None:
        self._table = table

    def __getitem__(self, name: str) -> Column:
        table = self._table
        if name in table.columns:
            return table.columns[name]
        if name == "time":
            return table.time
        if name == "source":
            return list(table.source)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter({**self._table.columns, "time": None, "source": None})

    def __len__(self) -> int:
        return len({*self._table.columns, "time", "source"})


class RowStep(ABC):
    """A step on rows: it keeps some, or gives them other columns. :class:`RowStage` does the rest."""

    ordered: ClassVar[bool] = False
    """True: rows must come in the order of arrival of all sources together."""

    @abstractmethod
    def apply(self, table: Table, ports: list[tuple[str, Table]]) -> Table:
        """The rows that go on; those of ``ports`` leave here by that port; all others are filtered.

        Stateful steps see rows of each source in order of arrival.

        :raises ExpressionError: a field is not there or of the wrong type; state is as before the call.
        :raises RefusedError: other data that cannot pass; state is as before the call.
        """

    def snapshot(self) -> Any:
        """State as plain msgpack types, or None."""
        return None

    def restore(self, state: Any) -> None:
        """Continue from a :meth:`snapshot`."""

    def begin(self) -> None:
        """A call begins; :meth:`rollback` leads back to here."""

    def rollback(self) -> None:
        """The call failed: forget what it changed."""


class RowStage(Step):
    """Row steps one after the other on one table; keeps the books: rows that are nowhere else were filtered."""

    def __init__(self, steps: Sequence[RowStep]) -> None:
        self.steps = list(steps)
        self.ordered = any(step.ordered for step in steps)

    def process(self, messages: list[Message], emit: Emit) -> list[Message]:
        onward: list[tuple[int, Message]] = []
        leaving: list[tuple[int, str, Message]] = []
        dead = 0
        tabled = tables(messages, ordered=self.ordered)
        for table in tabled:
            current = [table]
            for step in self.steps:
                following: list[Table] = []
                ports: list[tuple[str, Table]] = []
                for piece in current:
                    dead += _apply(step, piece, following, ports, emit)
                leaving.extend((place, port, _by(port, m)) for port, t in ports for place, m in t.split())
                current = following
            onward.extend(pair for piece in current for pair in piece.split())
        if len(tabled) > 1:
            onward.sort(key=itemgetter(0))
        leaving.sort(key=itemgetter(0))
        for _, port, message in leaving:
            emit.send(message, port)
        out = [message for _, message in onward]
        kept = rows_of(out) + dead
        if leaving:
            kept += rows_of([m for _, _, m in leaving])
        if lost := rows_of(messages) - kept:
            emit.filter(lost)
        return out

    def snapshot(self) -> Any:
        states = [step.snapshot() for step in self.steps]
        return states if any(s is not None for s in states) else None

    def restore(self, state: Any) -> None:
        for step, own in zip(self.steps, state, strict=True):
            if own is not None:
                step.restore(own)

    def begin(self) -> None:
        for step in self.steps:
            step.begin()

    def rollback(self) -> None:
        for step in self.steps:
            step.rollback()


def _by(port: str, message: Message) -> Message:
    """The part of a message that leaves by ``port``, with an identity of its own: all parts may meet again in one sink."""
    return msgspec.structs.replace(message, id=f"{message.id}/{port}")


def _apply(step: RowStep, table: Table, following: list[Table], ports: list[tuple[str, Table]], emit: Emit) -> int:
    """One step on one table; if it refuses, on each message alone. Returns the rows that were rejected."""
    try:
        following.append(step.apply(table, ports))
    except (ExpressionError, RefusedError) as error:
        if len(table.messages) > 1:
            parts = (table.part(i) for i in range(len(table.messages)))
            return sum(_apply(step, part, following, ports, emit) for part in parts)
        refused = table.split()
        for _, message in refused:
            emit.reject(message, error.reason, str(error))
        return sum(message.rows for _, message in refused)
    return 0


def _schema(message: Message) -> Any:
    body = message.body
    if isinstance(body, Readings):
        # a list, not a generator: this is done for every message
        return tuple([(k, "text" if type(c) is list else c.dtype) for k, c in body.columns.items()])  # type: ignore[union-attr]
    return None


def tables(messages: Sequence[Message], *, ordered: bool = False) -> list[Table]:
    """Messages by schema; when one source has several schemas, by runs, so that each source keeps its order.

    :param ordered: by runs in any case.
    """
    groups: dict[Any, list[int]] = {}
    for i, message in enumerate(messages):
        key = _schema(message)
        groups.setdefault(i if key is None else key, []).append(i)
    if len(groups) > 1 and (ordered or _shared(messages, groups)):
        runs: list[list[int]] = []
        last: Any = None
        for i, message in enumerate(messages):
            key = _schema(message)
            if key is None or key != last or not runs:
                runs.append([])
            runs[-1].append(i)
            last = key
        return [_table(messages, run) for run in runs]
    return [_table(messages, places) for places in groups.values()]


def _shared(messages: Sequence[Message], groups: dict[Any, list[int]]) -> bool:
    """Whether a source is in more than one group."""
    seen: set[str] = set()
    for places in groups.values():
        own: set[str] = set()
        for i in places:
            body = messages[i].body
            per_row = body.source if isinstance(body, Readings) else None
            own.update((messages[i].source,) if per_row is None else per_row)
        if own & seen:
            return True
        seen |= own
    return False


def _table(messages: Sequence[Message], places: list[int]) -> Table:
    chosen = [messages[i] for i in places]
    bodies = [m.body for m in chosen if isinstance(m.body, Readings)]
    if len(bodies) != len(chosen):
        one = rows(chosen)
        each = np.bincount(one.message, minlength=len(chosen)).tolist()
        return Table(chosen, places, one.n, one.columns, one.time, Places(each))
    if len(chosen) == 1:
        body, n = bodies[0], bodies[0].n
        time = np.full(n, chosen[0].time, np.int64) if body.time is None else body.time
        return Table(chosen, places, n, dict(body.columns), time, Places([n]))
    lengths = [b.n for b in bodies]
    n = sum(lengths)
    columns = {name: concat([b.columns[name] for b in bodies], lengths) for name in bodies[0].columns}
    return Table(chosen, places, n, columns, None, Places(lengths))


def _times(messages: Sequence[Message]) -> NDArray[np.int64]:
    """The event times of all rows of readings."""
    bodies = [m.body for m in messages if isinstance(m.body, Readings)]
    if all(b.time is None for b in bodies):
        return np.repeat(np.array([m.time for m in messages], np.int64), [b.n for b in bodies])
    return np.concatenate(
        [np.full(b.n, m.time, np.int64) if b.time is None else b.time for b, m in zip(bodies, messages, strict=True)]
    )


def by_source(table: Table) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Each source with the indices of its rows, in order."""
    codes, names = table.sources
    if len(names) == 1:
        yield names[0], np.arange(table.n)
        return
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(names) + 1)).tolist()
    for name, start, end in zip(names, bounds, bounds[1:], strict=False):
        if end > start:
            yield name, order[start:end]
