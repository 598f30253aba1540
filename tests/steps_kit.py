"""What the tests of the steps share: messages from plain values, steps from what a user writes, and the books."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nodes.operator import Context, Emit, Operator
from nodes.preprocess import Config, build
from schemas.messages import Array, Column, Frame, Message, Readings

CONTEXT = Context("plant", "clean", Path(), Path())
SECOND = 10**9


def operator(*steps: Any) -> Operator:
    return build(Config.model_validate({"steps": list(steps)}), CONTEXT)


def reading(
    number: int,
    columns: dict[str, Any],
    *,
    source: str = "s1",
    time: Sequence[float] | float = 0.0,
    per_row: Any = None,
) -> Message:
    """Readings ``ingest:a:<number>``; lists of texts stay lists; ``time`` in seconds."""
    made: dict[str, Column] = {
        name: values
        if isinstance(values, np.ndarray) or any(isinstance(v, str) for v in values)
        else np.array([np.nan if v is None else v for v in values])
        for name, values in columns.items()
    }
    n = len(next(iter(made.values()))) if made else 0
    times = None if isinstance(time, (int, float)) else np.array([round(t * SECOND) for t in time], np.int64)
    first = time if isinstance(time, (int, float)) else (time[0] if time else 0)
    body = Readings(n=n, columns=made, time=times, source=per_row)
    return Message(f"ingest:a:{number}", source, round(first * SECOND), body)


def frame(data: Array | bytes, layout: str = "HWC", number: int = 0, **rest: Any) -> Message:
    return Message(f"camera:a:{number}", "camera", 0, Frame(data=data, layout=layout, **rest))


def run(node: Operator, messages: Sequence[Message], sizes: Sequence[int] = ()) -> list[tuple[str, Message]]:
    """All messages through the node in calls of these sizes (the last for the rest), with the end; checks the books."""
    sent, _ = books(node, messages, sizes)
    return sent


def books(
    node: Operator, messages: Sequence[Message], sizes: Sequence[int] = (), *, keep: bool = False
) -> tuple[list[tuple[str, Message]], Emit]:
    """As :func:`run`, with everything that was emitted; ``keep``: the state goes through msgpack between calls."""
    whole = Emit()
    left = list(messages)
    pending = list(sizes)
    received = 0

    def merge(emit: Emit) -> None:
        whole.sent += emit.sent
        whole.dead += emit.dead
        whole.filtered += emit.filtered
        whole.absorbed += emit.absorbed
        for reason, rows in emit.dropped.items():
            whole.drop(reason, rows)

    def check() -> None:
        out = whole.absorbed if node.absorbs else sum(m.rows for _, m in whole.sent)
        dead = sum(m.rows for m, _, _ in whole.dead)
        gone = out + whole.filtered + sum(whole.dropped.values()) + dead + node.held()
        assert received == gone, (received, out, whole.filtered, whole.dropped, dead, node.held())

    while left:
        size = pending.pop(0) if pending else len(left)
        part, left = left[: max(size, 1)], left[max(size, 1) :]
        emit = Emit()
        node.process(part, "ingest.out", emit)
        received += sum(m.rows for m in part)
        merge(emit)
        check()
        if keep:
            state = node.snapshot()
            if state is not None:
                node.restore(msgspec.msgpack.decode(msgspec.msgpack.encode(state)))
    emit = Emit()
    node.finish(emit)
    merge(emit)
    check()
    return whole.sent, whole


def table(message: Message) -> dict[str, list[Any]]:
    """The columns of readings as plain lists, NaN as None."""
    body = message.body
    assert isinstance(body, Readings)
    return {
        name: [None if v is None or v != v else v for v in (c if isinstance(c, list) else c.tolist())]
        for name, c in body.columns.items()
    }


def only(node: Operator, message: Message) -> Message:
    """What one message becomes."""
    (sent,) = run(node, [message])
    assert sent[0] == "out"
    return sent[1]


def refused(node: Operator, message: Message) -> str:
    """Why one message is rejected."""
    sent, emit = books(node, [message])
    assert not sent
    ((dead, reason, detail),) = emit.dead
    assert dead.id == message.id
    assert detail
    return reason


def plain(sent: Sequence[tuple[str, Message]]) -> list[Any]:
    """Everything that another node would see, comparable."""
    out: list[Any] = []
    for port, message in sent:
        body = message.body
        if isinstance(body, Readings):
            times = None if body.time is None else body.time.tolist()
            dtypes = {k: "text" if isinstance(c, list) else c.dtype.str for k, c in body.columns.items()}
            shown: Any = (body.n, table(message), times, body.source, dtypes)
        elif isinstance(body, Frame):
            data = repr(body.data.tolist()) if isinstance(body.data, np.ndarray) else bytes(body.data)
            shown = (data, body.layout, body.rate)
        else:
            shown = msgspec.to_builtins(body, enc_hook=lambda a: a.tolist())
        out.append((port, message.id, message.source, message.time, shown))
    return out
