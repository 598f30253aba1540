"""Every kind of window against a row-by-row account in plain Python, under any batching, order and snapshot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.aggregate import Config, build
from nodes.operator import Context, Emit
from nodes.windowing.aggregator import Aggregator
from schemas.messages import Aggregate, Message, Readings

CONTEXT = Context("plant", "agg", Path(), Path())
EDGE = "in.out"
SECOND = 10**9
Stream: TypeAlias = tuple[list["Row"], list[int], list[bool]]
"""Rows, bounds of the batches, and whether a batch is one message."""
FIELDS = {
    "n": "count()",
    "hot": "count(v > 0)",
    "there": "count(v)",
    "sum": "sum(v)",
    "mean": "mean(v)",
    "sd": "stddev(v)",
    "var": "variance(v)",
    "low": "min(v)",
    "high": "max(v)",
    "range": "range(v)",
    "first": "first(v)",
    "last": "last(v)",
    "delta": "delta(v)",
    "slope": "rate(v)",
    "per_s": "rate()",
    "median": "median(v)",
    "q9": "quantile(v, 0.9)",
    "distinct": "distinct(v)",
    "mode": "mode(v)",
    "area": "integral(v)",
    "tmean": "time_mean(v)",
    "h": "histogram(v, -1, 1)",
}


@dataclass(frozen=True)
class Row:
    key: str
    time: int
    value: float


def message(row: Row, number: int) -> Message:
    return Message(f"in:x:{number}", row.key, row.time, Readings(n=1, columns={"v": np.array([row.value])}))


def together(rows: list[Row], number: int) -> Message:
    body = Readings(
        n=len(rows),
        columns={"v": np.array([r.value for r in rows])},
        time=np.array([r.time for r in rows], np.int64),
        source=[r.key for r in rows],
    )
    return Message(f"in:y:{number}", "gateway", rows[0].time, body)


def operator(window: Any, delay: int = 0, lateness: int = 0, fields: dict[str, str] | None = None) -> Aggregator:
    config = Config.model_validate(
        {
            "window": window,
            "by": "source",
            "fields": FIELDS if fields is None else fields,
            "watermark": {"delay": f"{delay}ns"},
            "lateness": f"{lateness}ns",
        }
    )
    config.check(CONTEXT)
    return build(config, CONTEXT)


# -- the account, one row at a time ---------------------------------------------------------------------------------


def statistics(rows: list[Row], seconds: float) -> dict[str, Any]:
    there = [r for r in rows if not np.isnan(r.value)]
    ordered = sorted(there, key=lambda r: r.time)  # stable: arrival order among equals
    x = np.array([r.value for r in ordered])
    t = np.array([r.time for r in ordered]) / 1e9
    out: dict[str, Any] = dict.fromkeys(FIELDS)
    del out["h"]
    out |= {"n": len(rows), "hot": int((x > 0).sum()), "there": len(x), "distinct": len(set(x.tolist()))}
    out["per_s"] = len(rows) / seconds
    out |= {"h_lt_-1": int((x < -1).sum()), "h_-1_1": int(((x >= -1) & (x < 1)).sum()), "h_ge_1": int((x >= 1).sum())}
    if len(x):
        values, counts = np.unique(x, return_counts=True)
        out |= {"sum": x.sum(), "mean": x.mean(), "low": x.min(), "high": x.max(), "range": x.max() - x.min()}
        out |= {"first": x[0], "last": x[-1], "delta": x[-1] - x[0], "mode": values[counts.argmax()]}
        out |= {"median": np.median(x), "q9": np.quantile(x, 0.9), "area": np.trapezoid(x, t)}
        out["tmean"] = np.trapezoid(x, t) / (t[-1] - t[0]) if t[-1] > t[0] else x[-1]
        if t[-1] > t[0]:
            out["slope"] = (x[-1] - x[0]) / (t[-1] - t[0])
    if len(x) > 1:
        out |= {"sd": x.std(ddof=1), "var": x.var(ddof=1)}
    return out


@dataclass
class Answer:
    key: str
    start: int
    end: int
    revision: int
    rows: list[Row]


@dataclass
class TimeOracle:
    """Tumbling and sliding windows by their definition."""

    size: int
    every: int
    delay: int
    lateness: int
    windows: dict[tuple[int, str], list[Row]] = field(default_factory=dict)
    base: dict[tuple[int, str], int] = field(default_factory=dict)
    mark: float = -np.inf
    late: int = 0

    def put(self, row: Row) -> list[Answer]:
        high = row.time // self.every
        low = (row.time - self.size) // self.every + 1
        mine = [w * self.every for w in range(low, high + 1)]
        kept = [w for w in mine if w + self.size + self.lateness > self.mark]
        out = []
        if not kept:
            self.late += 1
        for start in kept:
            rows = self.windows.setdefault((start, row.key), [])
            rows.append(row)
            if start + self.size <= self.mark:
                base = self.base.setdefault((start, row.key), 1)
                out.append(Answer(row.key, start, start + self.size, len(rows) - base, list(rows)))
        out.sort(key=lambda a: a.end)
        return out + self.upto(max(self.mark, row.time - self.delay))

    def upto(self, mark: float) -> list[Answer]:
        ended = [w for w in self.windows if self.mark < w[0] + self.size <= mark]
        self.mark = mark
        for w in ended:
            self.base[w] = len(self.windows[w])
        return [Answer(w[1], w[0], w[0] + self.size, 0, list(self.windows[w])) for w in sorted(ended)]


@dataclass
class SessionOracle:
    """Sessions by their definition; no lateness."""

    gap: int
    delay: int
    spans: list[tuple[str, list[Row]]] = field(default_factory=list)
    mark: float = -np.inf
    late: int = 0

    def put(self, row: Row) -> list[Answer]:
        touched = [s for s in self.spans if s[0] == row.key and any(abs(r.time - row.time) < self.gap for r in s[1])]
        inside = any(min(r.time for r in s[1]) <= row.time for s in touched)
        if not inside and row.time + self.gap <= self.mark:
            self.late += 1
        else:
            rows = [r for s in touched for r in s[1]]
            self.spans = [s for s in self.spans if s not in touched]
            self.spans.append((row.key, [*rows, row]))
        return self.upto(max(self.mark, row.time - self.delay))

    def upto(self, mark: float) -> list[Answer]:
        self.mark = mark
        out = []
        for span in list(self.spans):
            key, rows = span
            end = max(r.time for r in rows) + self.gap
            if end <= mark:
                self.spans.remove(span)
                out.append(Answer(key, min(r.time for r in rows), end, 0, rows))
        return sorted(out, key=lambda a: (a.end, a.key))


@dataclass
class CountOracle:
    size: int
    every: int
    seen: dict[str, list[Row]] = field(default_factory=dict)
    late: int = 0

    def put(self, row: Row) -> list[Answer]:
        rows = self.seen.setdefault(row.key, [])
        rows.append(row)
        over = len(rows) - self.size
        return [self._answer(row.key, over)] if over >= 0 and over % self.every == 0 else []

    def _answer(self, key: str, start: int) -> Answer:
        rows = self.seen[key][start : start + self.size]
        return Answer(key, min(r.time for r in rows), max(r.time for r in rows) + 1, 0, rows)

    def upto(self, mark: float) -> list[Answer]:
        out = []
        for key, rows in self.seen.items():
            start = 0
            while start < len(rows):
                if start + self.size > len(rows):
                    out.append(self._answer(key, start))
                start += self.every
        return sorted(out, key=lambda a: (a.end, a.key, a.start))


# -- comparing ------------------------------------------------------------------------------------------------------


def same(sent: Message, answer: Answer) -> None:
    body = sent.body
    assert isinstance(body, Aggregate)
    assert (body.key, body.window.start, body.window.end) == (answer.key, answer.start, answer.end)
    assert (body.revision, body.count) == (answer.revision, len(answer.rows))
    assert sent.source == answer.key
    assert sent.time == answer.end - 1
    expected = statistics(answer.rows, (answer.end - answer.start) / 1e9)
    assert set(body.values) == set(expected)
    for name, value in expected.items():
        got = body.values[name]
        if value is None:
            assert got is None, name
        else:
            assert got == pytest.approx(float(value), rel=1e-9, abs=1e-9), (name, got, value)


def cut(draw: Callable[[Any], Any], count: int) -> list[int]:
    """Bounds of batches."""
    inner = draw(st.sets(st.integers(1, max(count - 1, 1)), max_size=6))
    return [0, *sorted(i for i in inner if i < count), count]


@st.composite
def streams(draw: Callable[[Any], Any]) -> Stream:
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from("abc"),
                st.integers(-8, 12),
                st.one_of(st.sampled_from([np.nan, 0.0, 1.0, -1.0]), st.floats(-1e6, 1e6, width=32)),
            ),
            min_size=1,
            max_size=40,
        )
    )
    time, rows = draw(st.integers(-50, 50)), []
    for key, step, value in steps:
        time += max(step, -8)
        rows.append(Row(key, time * SECOND // 2, value))
    bounds = cut(draw, len(rows))
    return rows, bounds, draw(st.lists(st.booleans(), min_size=len(bounds), max_size=len(bounds)))


def feed(make: Callable[[], Aggregator], stream: Stream, *, stop: bool = False) -> tuple[list[Message], Emit]:
    """Run a stream through in its batches, as messages of one row or as one message; ``stop`` puts a snapshot and a new
    operator after every batch."""
    rows, bounds, one = stream
    op, total = make(), Emit()
    for i, (a, b) in enumerate(pairwise(bounds)):
        part = rows[a:b]
        op.process([together(part, i)] if one[i] else [message(r, a + j) for j, r in enumerate(part)], EDGE, total)
        if stop:
            state = msgspec.msgpack.decode(msgspec.msgpack.encode(op.snapshot()))
            op = make()
            op.restore(state)
    op.finish(total)
    assert total.absorbed + sum(total.dropped.values()) == len(rows)
    assert op.groups.used == 0, "everything is let go of at the end"
    return total.messages(), total


def singly(rows: list[Row]) -> Stream:
    """The rows one at a time."""
    return rows, list(range(len(rows) + 1)), [False] * len(rows)


def exactly(messages: list[Message]) -> list[bytes]:
    """Messages to the last bit."""
    return [msgspec.msgpack.encode(m) for m in messages]


def check(make: Callable[[], Aggregator], oracle: Any, stream: Stream, *, exact: bool = True) -> None:
    sent, total = feed(make, stream)
    expected: list[Answer] = []
    for row in stream[0]:
        expected += oracle.put(row)
    expected += oracle.upto(np.inf)
    assert len(sent) == len(expected)
    for got, answer in zip(sent, expected, strict=True):
        same(got, answer)
    assert total.dropped.get("late", 0) == oracle.late
    assert len({m.id for m in sent}) == len(sent)
    again, _ = feed(make, stream, stop=True)
    assert exactly(again) == exactly(sent), "a snapshot and a restore after every batch change nothing"
    single, _ = feed(make, singly(stream[0]))
    if exact:
        assert exactly(single) == exactly(sent), "batching changes nothing, to the last bit"
    assert [m.id for m in single] == [m.id for m in sent]
    for got, answer in zip(single, expected, strict=True):
        same(got, answer)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(streams(), st.sampled_from([0, 1, 3]))
def test_tumbling(stream: Stream, delay: int) -> None:
    check(
        lambda: operator("5s", delay * SECOND),
        TimeOracle(5 * SECOND, 5 * SECOND, delay * SECOND, 0),
        stream,
    )


@settings(deadline=None, derandomize=True, max_examples=40)
@given(streams(), st.sampled_from([0, 1, 3]), st.sampled_from([(6, 2), (5, 2), (4, 4), (7, 3)]))
def test_sliding(stream: Stream, delay: int, shape: tuple[int, int]) -> None:
    size, every = shape
    check(
        lambda: operator({"sliding": {"size": f"{size}s", "every": f"{every}s"}}, delay * SECOND),
        TimeOracle(size * SECOND, every * SECOND, delay * SECOND, 0),
        stream,
    )


@settings(deadline=None, derandomize=True, max_examples=40)
@given(streams(), st.sampled_from([0, 1, 3]), st.sampled_from([1, 3]))
def test_session(stream: Stream, delay: int, gap: int) -> None:
    check(
        lambda: operator({"session": {"gap": f"{gap}s"}}, delay * SECOND),
        SessionOracle(gap * SECOND, delay * SECOND),
        stream,
        exact=False,  # sums of sessions that a row joins are added in another order
    )


@settings(deadline=None, derandomize=True, max_examples=40)
@given(streams(), st.sampled_from([(3, 3), (4, 2), (5, 2), (1, 1)]))
def test_count(stream: Stream, shape: tuple[int, int]) -> None:
    size, every = shape
    check(lambda: operator({"count": {"size": size, "every": every}}), CountOracle(size, every), stream)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(streams(), st.sampled_from([0, 1]), st.sampled_from([2, 6]), st.sampled_from([(5, 5), (6, 2)]))
def test_lateness_row_by_row(stream: Stream, delay: int, lateness: int, shape: tuple[int, int]) -> None:
    rows = stream[0]
    size, every = shape

    def make() -> Aggregator:
        window = {"sliding": {"size": f"{size}s", "every": f"{every}s"}}
        return operator(window, delay * SECOND, lateness * SECOND)

    sent, total = feed(make, singly(rows))
    oracle = TimeOracle(size * SECOND, every * SECOND, delay * SECOND, lateness * SECOND)
    expected: list[Answer] = []
    for row in rows:
        expected += oracle.put(row)
    expected += oracle.upto(np.inf)
    assert [m.id for m in sent] == [
        f"agg:{a.key}:{a.start}" + (f"/{a.revision}" if a.revision else "") for a in expected
    ]
    for got, answer in zip(sent, expected, strict=True):
        same(got, answer)
    assert total.dropped.get("late", 0) == oracle.late
    batched, total = feed(make, stream, stop=True)
    known = {m.id: m for m in sent}
    assert total.dropped.get("late", 0) == oracle.late
    for got in batched:
        assert got == known[got.id], "an id stands for one answer however rows are batched"
    newest = {(m.body.key, m.body.window.start): m for m in sent if isinstance(m.body, Aggregate)}
    ours = {(m.body.key, m.body.window.start): m for m in batched if isinstance(m.body, Aggregate)}
    assert ours == newest, "the newest answer of every window is the same"
