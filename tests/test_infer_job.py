"""``infer`` with the weights of a trainer, and with the models of a federated job as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brokers import started
from harness import until

from broker.blobs import Broadcast, offer
from broker.bus import Publication
from broker.connect import connect
from nodes import kinds
from nodes.federated import file, wire
from nodes.federated.follower import Follower
from nodes.federated.weights import Weights, digest, shapes
from nodes.infer import Config, build
from nodes.inference import Infer
from nodes.operator import Context, Emit
from nodes.trainers.mlp import Config as Network
from schemas import topics
from schemas.errors import ConfigError, PenstockError
from schemas.messages import Frame, Message, Predictions
from schemas.problems import validated

NETWORK: dict[str, Any] = {"layers": [4, 3], "seed": 3}
BACKEND = {"trained": {"trainer": {"mlp": NETWORK}}}


def weights(favourite: int) -> Weights:
    """Of a model that always answers with one class."""
    bias = np.zeros(3, np.float32)
    bias[favourite] = 9
    return {"w1": np.zeros((4, 3), np.float32), "b1": bias}


def manifest(model: Weights, version: int, *, epoch: int = 7, run: int = 5, **changed: Any) -> bytes:
    fields: dict[str, Any] = {
        "job": "belt", "run": run, "epoch": epoch, "round": version, "version": version, "digest": digest(model),
        "blob": "", "size": 0, "shapes": shapes(model), "data": wire.pack_model(model, {}),
    }  # fmt: skip
    return wire.say(wire.Manifest(**{**fields, **changed}))


def operator(folder: Path, broker: str = "", **options: Any) -> Infer:
    config = validated(Config, {"model": "belt.npz", "backend": BACKEND, "labels": ["a", "b", "c"], **options})
    context = Context("line", "seen", folder, folder / "state" / "seen", broker=broker)
    config.check(context)
    made = build(config, context)
    assert isinstance(made, Infer)
    made.open()
    return made


def answer(infer: Infer) -> Predictions:
    emit = Emit()
    infer.process([Message("cam:1:0", "cam", 7, Frame(data=np.zeros((2, 2), np.float32)))], "cam.out", emit)
    (message,) = emit.messages()
    assert isinstance(message.body, Predictions)
    return message.body


def test_weights_in_a_file_answer(tmp_path: Path) -> None:
    file.write(tmp_path / "belt.npz", weights(2))
    infer = operator(tmp_path)
    assert answer(infer).labels == ["c"]
    assert len(infer.model.digest) == 64
    infer.close()


def test_a_trainers_answers_are_infers(tmp_path: Path) -> None:
    context = Context("line", "seen", tmp_path, tmp_path)
    trainer = kinds.module("trainer", "mlp").build(validated(Network, {"layers": [4, 5, 3], "seed": 9}), context)
    trainer.open()
    file.write(tmp_path / "belt.npz", trainer.weights())
    infer = operator(tmp_path, backend={"trained": {"trainer": {"mlp": {"layers": [4, 5, 3], "seed": 1}}}}, top=3)
    x = np.array([[3, 1, 0, 2]], np.float32)
    emit = Emit()
    infer.process([Message("cam:1:0", "cam", 7, Frame(data=x.reshape(2, 2)))], "cam.out", emit)
    body = emit.messages()[0].body
    assert isinstance(body, Predictions)
    expected = trainer.predict(x)[0]
    assert np.allclose(body.scores, np.sort(expected)[::-1])
    infer.close()


@pytest.mark.parametrize(
    ("content", "wrong"),
    [(None, "no such file"), (b"not a zip", r"no \.npz file"), ("other", "another model's")],
)
def test_a_file_that_does_not_fit(tmp_path: Path, content: bytes | str | None, wrong: str) -> None:
    if content == "other":
        file.write(tmp_path / "belt.npz", {"w1": np.zeros((5, 3), np.float32), "b1": np.zeros(3, np.float32)})
    elif isinstance(content, bytes):
        (tmp_path / "belt.npz").write_bytes(content)
    with pytest.raises(ConfigError, match=wrong):
        operator(tmp_path)


def test_a_file_is_written_whole_and_alike(tmp_path: Path) -> None:
    file.write(tmp_path / "one.npz", weights(1))
    file.write(tmp_path / "two.npz", weights(1))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert digest(file.read(tmp_path / "one.npz")) == digest(weights(1))
    with pytest.raises(OSError, match=r"\[Errno"):
        file.write(tmp_path / "one.npz" / "no-folder.npz", weights(1))
    np.savez(tmp_path / "code.npz", w1=np.array([print], object), allow_pickle=True)
    np.save(tmp_path / "one.npy", np.zeros(3))
    for path in ("code.npz", "one.npy", "none.npz"):
        with pytest.raises(ConfigError):
            file.read(tmp_path / path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["code.npz", "one.npy", "one.npz", "two.npz"]


@pytest.mark.parametrize(
    ("options", "wrong"),
    [({"job": "Belt 1"}, "lower-case letters"), ({"job": "belt", "backend": "litert"}, "run by their trainer")],
)
def test_a_job_that_cannot_be_followed(tmp_path: Path, options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        operator(tmp_path, **options)


def test_before_its_first_model_a_job_has_the_trainers_own(tmp_path: Path) -> None:
    infer = operator(tmp_path, job="belt")
    assert (infer.model.version, infer.model.digest) == ("untrained", "")
    assert answer(infer).labels[0] in "abc"
    assert not (tmp_path / "belt.npz").exists()
    infer.close()


class Heard:
    """A follower without a bus: what it handed over, and what it asked for."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, str]] = []
        self.machine = Follower("belt", "seen", lambda m, w: self.taken.append((m.version, digest(w))))
        self.machine.start({}, 0)
        self.said: list[tuple[str, bytes]] = []
        self.work: Callable[[], Any] | None = None

    def hear(self, payload: bytes, now: int = 0, topic: str = "model") -> None:
        self._do(self.machine.heard(topic, payload, now))

    def tick(self, now: int) -> None:
        self._do(self.machine.tick(now))

    def _do(self, out: Any) -> None:
        self.said += [(say.topic, say.payload) for say in out.say]
        if out.work is not None:
            assert self.work is None
            self.work = out.work.act

    def finish(self) -> None:
        act, self.work = self.work, None
        assert act is not None
        try:
            result = act()
        except PenstockError as error:
            result = error
        self._do(self.machine.worked("take", result, 0))


def test_what_was_replaced_meanwhile_is_left_out() -> None:
    heard = Heard()
    for version in range(5):
        heard.hear(manifest(weights(version % 3), version))
    heard.finish()
    heard.finish()
    assert heard.taken == [(0, digest(weights(0))), (4, digest(weights(1)))]
    assert heard.work is None


def test_repeats_and_what_is_older_change_nothing() -> None:
    heard = Heard()
    heard.hear(manifest(weights(0), 6))
    heard.finish()
    for old in (manifest(weights(1), 6), manifest(weights(1), 5), manifest(weights(1), 9, epoch=6),
                manifest(weights(1), 9, run=4), manifest(weights(1), 9, job="other"), b"", b"garbage"):  # fmt: skip
        heard.hear(old)
        assert heard.work is None
    heard.hear(manifest(weights(2), 0, epoch=1, run=6))  # another life of the job
    heard.finish()
    assert [version for version, _ in heard.taken] == [6, 0]


def test_a_model_that_is_not_its_manifests_is_not_taken() -> None:
    heard = Heard()
    broken = weights(1)
    broken["b1"][0] = np.nan
    for wrong in (manifest(weights(0), 1, digest="0" * 64), manifest(broken, 2), manifest(weights(0), 3, data=b"\x81")):
        heard.hear(wrong)
        heard.finish()
    assert heard.taken == []
    assert heard.machine.garbage == 3


def test_a_large_model_comes_in_chunks_and_the_next_one_may_overtake_it() -> None:
    heard, now = Heard(), 0
    for version, bring in ((1, False), (2, True)):
        large = {"w1": np.full(2000, version, np.float32)}
        data = wire.pack_model(large, {})
        blob = offer(data, 1024)
        said = Broadcast(blob, data, now)
        asked = len(heard.said)
        heard.hear(manifest(large, version, data=b"", blob=blob.digest, size=blob.size, chunk=blob.chunk), now)
        while bring and not heard.taken:
            now += 10_000_000
            heard.tick(now)
            for need in heard.said[asked:]:
                said.heard(need[1], now)
            asked = len(heard.said)
            for chunk in said.send(now):
                heard.hear(chunk, now, topic=f"blob/{blob.digest}")
            if heard.work is not None:
                heard.finish()
            assert now < 60 * 10**9
    assert {topic for topic, _ in heard.said} == {"c/seen/need"}
    assert heard.taken == [(2, digest(large))]
    assert heard.machine.wake() is None


@pytest.mark.parametrize("broker", ["embedded", "mosquitto"])
def test_models_come_over_the_bus_and_stay_in_the_file(tmp_path: Path, broker: str) -> None:
    async def run(url: str) -> None:
        infer = operator(tmp_path, url, job="belt")
        topic = topics.federated("line", "belt") + "/model"
        bus = connect(url, client_id="lead")
        await bus.open()
        await (await bus.publish([Publication(topic, manifest(weights(1), 1), 1, True)]))  # retained: before we listen
        task = asyncio.create_task(infer.beside())
        try:
            await until(lambda: infer.model.version == "1" or task.done())
            assert answer(infer).labels == ["b"]
            wrong = manifest({"w1": np.zeros((4, 9), np.float32), "b1": np.zeros(9, np.float32)}, 2)
            await (await bus.publish([Publication(topic, wrong, 1, True)]))
            await (await bus.publish([Publication(topic, manifest(weights(2), 3), 1, True)]))
            await until(lambda: infer.model.version == "3" or task.done())
            assert answer(infer).labels == ["c"]
            assert answer(infer).model.digest == infer.model.digest
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await bus.close()
        infer.close()

    with started(broker, tmp_path / "broker") as there:
        asyncio.run(run(there.url))
    again = operator(tmp_path, job="belt")  # without a broker: with what it had
    assert answer(again).labels == ["c"]
    again.close()
