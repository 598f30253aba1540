"""The operator of ``join``: rows of several streams that belong together in time."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from operator import attrgetter
from typing import Any, ClassVar

import numpy as np

from nodes.operator import Emit, Operator
from nodes.windowing.base import FLOOR, FOREVER, HORIZON
from nodes.windowing.keys import join, texts_of
from schemas.messages import Message, Readings, Scalar
from schemas.rows import Rows, from_scalars, rows


@dataclass(slots=True)
class Row:
    """One row that waits.

    :param ident: id that an answer made of it has.
    :param weight: rows that the ledger counts for it: a message that is no readings counts once.
    :param used: it is part of an answer, and booked.
    """

    time: int
    ident: str
    source: str
    key: str
    values: dict[str, Scalar]
    weight: int
    used: bool = False


_time = attrgetter("time")


class Side:
    """One input: its rows by key, oldest first, and how far its time has come."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.newest = FLOOR
        self.over = False
        self.rows: dict[str, list[Row]] = {}
        self.size = 0
        self.oldest = HORIZON
        """No row is older than this."""

    def mark(self, delay: int) -> int:
        """Rows older than this are late."""
        return FOREVER if self.over else self.newest - delay

    def put(self, row: Row) -> None:
        """Keep a row; of equal times the first to come stays first."""
        insort(self.rows.setdefault(row.key, []), row, key=_time)
        self.size += 1
        self.oldest = min(self.oldest, row.time)

    def before(self, time: int) -> list[Row]:
        """Take out all rows older than ``time``, by time and key."""
        if self.oldest >= time:
            return []
        out: list[Row] = []
        self.oldest = HORIZON
        for key in list(self.rows):
            mine = self.rows[key]
            end = bisect_left(mine, time, key=_time)
            out += mine[:end]
            if end == len(mine):
                del self.rows[key]
                continue
            del mine[:end]
            self.oldest = min(self.oldest, mine[0].time)
        self.size -= len(out)
        out.sort(key=lambda r: (r.time, r.key))
        return out

    def near(self, key: str, time: int, within: int) -> list[Row]:
        """Rows of a key at most ``within`` from ``time``."""
        mine = self.rows.get(key)
        if not mine:
            return []
        start = bisect_left(mine, time - within, key=_time)
        return mine[start : bisect_left(mine, time + within + 1, key=_time)]

    def all(self) -> Iterator[Row]:
        """Every row kept."""
        for key in sorted(self.rows):
            yield from self.rows[key]


class Pairing(Operator):
    """See :mod:`nodes.join`. The first edge leads: each of its rows is answered once every other edge's time has passed it
    by ``within``.

    :param prefixes: in-edge → prefix of its fields; the first leads.
    :param keep_left: rows of the first edge without partner are answered alone.
    :param keep_right: those of the other edges as well.
    :param every: an answer for each partner, instead of for the nearest.
    :param limit: most rows kept of one edge.
    :param clock: ns since the epoch; only silence is measured with it.
    """

    absorbs: ClassVar[bool] = True

    def __init__(
        self,
        *,
        prefixes: Mapping[str, str],
        within: int,
        by: tuple[str, ...],
        keep_left: bool,
        keep_right: bool,
        every: bool,
        delay: int,
        idle: int | None,
        limit: int,
        clock: Callable[[], int],
    ) -> None:
        self.sides = {edge: Side(prefix) for edge, prefix in prefixes.items()}
        self.lead, *others = self.sides.values()
        self.others = others
        self._names = {id(side): edge.partition(".")[0] for edge, side in self.sides.items()}
        self.within = within
        self.by = by
        self.keep_left = keep_left
        self.keep_right = keep_right
        self.every = every
        self.delay = delay
        self.idle = idle
        self.limit = limit
        self.clock = clock
        self._heard = 0

    def process(self, messages: list[Message], edge: str, emit: Emit) -> None:
        """Take rows in, answer those that nothing can change any more."""
        side = self.sides.get(edge)
        if side is None:
            raise ValueError(f"{edge} is none of this node's inputs")
        table = rows(messages)
        if table.n and not -HORIZON < int(table.time.min()) <= int(table.time.max()) < HORIZON:
            raise ValueError("an event time is not between 1824 and 2116")
        waiting, empty = self._rows(messages, table)
        for row in waiting:
            if row.time < side.mark(self.delay):
                emit.drop("late", row.weight)
                continue
            side.newest = max(side.newest, row.time)
            side.put(row)
        for message in empty:  # a frame in which nothing was found: time goes on all the same
            emit.filter(message.rows)
            side.newest = max(side.newest, message.time)
        self._heard = self.clock()
        self._settle(emit)
        for kept in self.sides.values():
            self._bound(kept, emit)

    def _rows(self, messages: list[Message], table: Rows) -> tuple[list[Row], list[Message]]:
        """Rows as they wait, and the messages that have none."""
        n = table.n
        keys = [
            table.source if name == "source" and name not in table.columns else self._texts(table, name)
            for name in self.by
        ]
        key = join(keys) if keys else [""] * n
        names = list(table.columns)
        columns = [c if isinstance(c, list) else c.tolist() for c in table.columns.values()]
        values = list(zip(*columns, strict=True)) if columns else [()] * n
        lengths = np.bincount(table.message, minlength=len(messages)).tolist()
        out: list[Row] = []
        for message, count in zip(messages, lengths, strict=True):
            batch = isinstance(message.body, Readings)
            for i in range(count):
                at = len(out)
                ident = f"{message.id}/{i}" if count > 1 else message.id
                mine = {name: v for name, v in zip(names, values[at], strict=True) if v is not None and v == v}
                weight = 1 if batch or i == 0 else 0
                out.append(Row(int(table.time[at]), ident, table.source[at], key[at], mine, weight))
        empty = [m for m, count in zip(messages, lengths, strict=True) if not count]
        return out, empty

    @staticmethod
    def _texts(table: Rows, name: str) -> list[str]:
        column = table.columns.get(name)
        return [""] * table.n if column is None else texts_of(column, table.n)

    # -- answers ------------------------------------------------------------------------------------------------

    def _settle(self, emit: Emit, *, now: bool = False) -> None:
        """Answer the leading rows that are settled, then let go of partners that no row can ask for any more.

        :param now: whatever may come yet.
        """
        passed = FOREVER if now else min(side.mark(self.delay) for side in self.others)
        for row in self.lead.before(passed - self.within):
            self._answer(row, emit)
        first = min(self.lead.mark(self.delay), self.lead.oldest)
        for side in self.others:
            for row in side.before(first - self.within):
                self._part(row, side, emit)

    def _answer(self, row: Row, emit: Emit) -> None:
        """Answer one leading row."""
        partners: list[list[tuple[Side, Row]]] = []
        missing = False
        for side in self.others:
            near = side.near(row.key, row.time, self.within)
            missing |= not near
            if near and not self.every:
                near = [min(near, key=lambda other: abs(other.time - row.time))]
            partners.append([(side, other) for other in near])
        if missing and not self.keep_left:
            emit.filter(row.weight)
            return
        emit.absorb(row.weight)
        found = [pairs for pairs in partners if pairs]
        several = self.every and bool(found)
        for i, pairs in enumerate(found[0] if several else [None]):
            group = [pairs] if pairs is not None else [p[0] for p in found]
            values = {self.lead.prefix + name: value for name, value in row.values.items()}
            for side, other in group:
                for name, value in other.values.items():
                    values.setdefault(side.prefix + name, value)
                if not other.used:
                    other.used = True
                    emit.absorb(other.weight)
            self._send(f"{row.ident}/{i}" if several else row.ident, row, values, emit)

    def _part(self, row: Row, side: Side, emit: Emit) -> None:
        """A partner leaves."""
        if row.used:
            return
        if not self.keep_right:
            emit.filter(row.weight)
            return
        emit.absorb(row.weight)
        values = {side.prefix + name: value for name, value in row.values.items()}
        self._send(f"{row.ident}/{self._names[id(side)]}", row, values, emit)

    @staticmethod
    def _send(ident: str, row: Row, values: dict[str, Scalar], emit: Emit) -> None:
        columns = {name: from_scalars([value]) for name, value in values.items()}
        emit.send(Message(ident, row.source, row.time, Readings(n=1, columns=columns)))

    def _bound(self, side: Side, emit: Emit) -> None:
        """Let the oldest rows of a side go that keeps too many."""
        over = side.size - self.limit
        if over <= 0:
            return
        times = sorted(row.time for row in side.all())
        gone = side.before(times[over - 1] + 1)
        emit.drop("buffer-full", sum(row.weight for row in gone if not row.used))

    # -- time and state -----------------------------------------------------------------------------------------

    def wake(self) -> int | None:
        """When silence will have lasted long enough for leading rows to be answered as they are."""
        return self._heard + self.idle if self.idle is not None and self.lead.size else None

    def tick(self, now: int, emit: Emit) -> None:
        """Answer waiting leading rows after silence."""
        due = self.wake()
        if due is not None and now >= due:
            self._settle(emit, now=True)

    def advance(self, edge: str, time: int, emit: Emit) -> int:
        """Time goes on without rows; our answers have come as far as the slowest edge."""
        if (side := self.sides.get(edge)) is not None:
            side.newest = max(side.newest, time)
            self._heard = self.clock()
            self._settle(emit)
        return min((side.mark(self.delay) for side in self.sides.values() if not side.over), default=time)

    def ended(self, edge: str, emit: Emit) -> None:
        """The edge brings nothing more."""
        if edge in self.sides:
            self.sides[edge].over = True
            self._settle(emit)

    def finish(self, emit: Emit) -> None:
        """Answer everything."""
        for side in self.sides.values():
            side.over = True
        self._settle(emit)
        for side in self.sides.values():
            side.over = False

    def held(self) -> int:
        """Rows that wait and are part of no answer yet."""
        return sum(row.weight for side in self.sides.values() for row in side.all() if not row.used)

    def snapshot(self) -> Any:
        """Rows that wait and the times of the edges, as plain msgpack types."""
        return {e: [s.newest, s.over, [list(astuple(r)) for r in s.all()]] for e, s in self.sides.items()}

    def restore(self, state: Any) -> None:
        """Continue. An input that is no more is forgotten, with its rows."""
        for edge, (newest, over, waiting) in state.items():
            if side := self.sides.get(edge):
                side.newest, side.over = newest, over
                for fields in waiting:
                    side.put(Row(*fields))
        self._heard = self.clock()


def prefixes(inputs: Iterable[str], chosen: Mapping[str, str]) -> dict[str, str]:
    """in-edge → prefix of its fields: as chosen for the edge or its node; else none for the first, ``<node>_`` for others."""
    out: dict[str, str] = {}
    for i, edge in enumerate(inputs):
        node = edge.partition(".")[0]
        usual = "" if i == 0 else f"{node.replace('-', '_')}_"
        out[edge] = chosen.get(edge, chosen.get(node, usual))
    return out
