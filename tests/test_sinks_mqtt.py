"""The mqtt sink's writing of many messages: in pieces, between which others have their turn, and as if it were in one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nodes import uplink
from nodes.operator import Context, Sink
from nodes.sinks.mqtt import PIECE
from schemas.errors import RejectedError
from schemas.messages import Message, Readings

NOW = 1714543200 * 10**9
COUNT = 5 * PIECE + 3
BAD = {0, PIECE, 2 * PIECE - 1, COUNT - 1}


def message(i: int, *, bad: bool = False) -> Message:
    columns: dict[str, Any] = {"v": ["\ud800"] if bad else np.array([float(i)])}  # no text that JSON can have
    return Message(f"n:1:{i}", f"d{i % 7}", NOW, Readings(n=1, columns=columns))


def written(tmp_path: Path, messages: list[Message], **options: Any) -> tuple[list[tuple[str, Any]], Any, int]:
    """What arrives, what the sink rejects, and how often another task had its turn meanwhile."""

    async def run() -> tuple[list[tuple[str, Any]], Any, int]:
        context = Context("line", "out", tmp_path, tmp_path, broker=f"local:{tmp_path.name}")
        config = uplink.Config.model_validate({"sink": "mqtt", "topic": "t/{source}", "qos": 0, **options})
        sink = uplink.build(config, context)
        assert isinstance(sink, Sink)
        turns, rejected = 0, None

        async def another() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async with context.bus(context.broker, "reader") as reader:
            listening = await reader.subscribe(["t/#"], qos=0, capacity=10_000)
            await sink.open()
            other = asyncio.create_task(another())
            try:
                await sink.write(messages)
            except RejectedError as error:
                rejected = error.rejected
            other.cancel()
            got = await listening.receive() if listening.queued else []
            await sink.close()
        return [(d.topic, json.loads(d.payload)) for d in got], rejected, turns

    return asyncio.run(run())


@pytest.mark.parametrize("each", ["message", "row"])
def test_many_messages_leave_in_their_order_each_on_its_topic(tmp_path: Path, each: str) -> None:
    got, rejected, turns = written(tmp_path, [message(i) for i in range(COUNT)], each=each)
    assert rejected is None
    assert [topic for topic, _ in got] == [f"t/d{i % 7}" for i in range(COUNT)]
    assert [body["id"] for _, body in got] == [f"n:1:{i}" for i in range(COUNT)]
    assert turns >= COUNT // PIECE


def test_what_cannot_be_written_is_named_by_its_place_in_the_whole(tmp_path: Path) -> None:
    got, rejected, _ = written(tmp_path, [message(i, bad=i in BAD) for i in range(COUNT)])
    assert [index for index, _ in rejected] == sorted(BAD)
    assert all("cannot be written as json" in why for _, why in rejected)
    assert [body["id"] for _, body in got] == [f"n:1:{i}" for i in range(COUNT) if i not in BAD]
