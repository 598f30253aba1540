"""``train`` waits for its permission, and says to the job that it does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from brokers import started
from harness import until

from broker.connect import connect
from nodes.federated import wire
from nodes.operator import Context
from nodes.train import Config, TrainSink, build
from schemas import topics
from schemas.problems import validated


def test_a_client_without_permission_is_here_and_trains_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodes.train.EVERY", 0.05)
    config = validated(Config, {"job": "digits", "trainer": {"mlp": {"layers": [4, 2]}}, "when": {"file": "unmetered"}})

    async def run(url: str) -> None:
        sink = build(config, Context("line", "learn", tmp_path, tmp_path / "learn", broker=url))
        assert isinstance(sink, TrainSink)
        await sink.open()
        beside = asyncio.create_task(sink.beside())
        bus = connect(url, client_id="looker")
        await bus.open()
        states = await bus.subscribe([topics.federated("line", "digits") + "/c/learn/state"])
        said: list[wire.Presence] = []

        async def listen() -> None:
            while True:
                for delivery in await states.receive():
                    said.append(wire.hear(wire.Presence, delivery.payload))
                    states.acknowledge([delivery])

        listening = asyncio.create_task(listen())
        try:
            await until(lambda: bool(said) and said[-1].why == "unmetered is not there")
            assert said[-1].here
            (tmp_path / "unmetered").touch()
            await until(lambda: said[-1].why == "")
            (tmp_path / "unmetered").unlink()
            await until(lambda: said[-1].why == "unmetered is not there")
            assert not beside.done()
        finally:
            for task in (beside, listening):
                task.cancel()
            await asyncio.gather(beside, listening, return_exceptions=True)
            await sink.close()
            await bus.close()

    with started("embedded", tmp_path / "broker") as broker:
        asyncio.run(run(broker.url))
