"""A node that learns alone, and replay against forgetting: as machines, and as a user runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from harness import run, until
from job_site import PLAN, Deaths, Mean, Softmax, parts

from nodes.federated import wire
from nodes.federated.alone import Solo
from nodes.federated.client import Client
from nodes.federated.coordinator import Coordinator
from nodes.federated.examples import Example, ExampleStore
from nodes.federated.machine import Answer
from nodes.federated.replay import Stock
from nodes.federated.rules import FOREVER, SECOND, Rules
from nodes.federated.store import look
from nodes.federated.virtual import Fault, Peer, World
from nodes.supervisor import Supervisor
from nodes.trainers._trainer import Examples, Fit, Fitted

DATA = parts(4)
RULES = Rules(job="j", rounds=FOREVER, fit=PLAN)


def given(examples: Examples, name: str = "a") -> list[Example]:
    return [Example(f"{name}{i}", i, x, int(y)) for i, (x, y) in enumerate(zip(examples.x, examples.y, strict=True))]


class Alone:
    """A node's machine in a world of its own, with a store of examples that outlives it."""

    def __init__(self, rules: Rules = RULES, share: float | None = None, fault: Fault | None = None, **more: Any):
        self.examples = ExampleStore(None)
        self.trainers: list[Softmax] = []
        self.models: list[wire.Manifest] = []
        self.calls: list[wire.Call] = []
        self.world = World(0, self._heard)

        def make() -> Solo:
            self.trainers.append(Softmax())
            return Solo(rules, self.trainers[-1], Stock(self.examples, share), **{"every": 60.0, **more})

        self.peer = self.world.add("solo", make, fault=fault, took=lambda machine, work: 1.0)

    def _heard(self, peer: Peer, say: Any) -> None:
        if say.topic == "model":
            self.models.append(wire.hear(wire.Manifest, say.payload))
        elif say.topic == "round":
            self.calls.append(wire.hear(wire.Call, say.payload))

    def add(self, examples: list[Example]) -> None:
        self.examples.add(examples)
        if self.peer.machine is not None:
            self.world._apply(self.peer, self.solo.fed(self.world.now))

    @property
    def solo(self) -> Solo:
        assert isinstance(self.peer.machine, Solo)
        return self.peer.machine

    def rows(self) -> dict[int, dict[str, Any]]:
        return {row["round"]: row for row in self.peer.rows}

    def wait(self, seconds: float) -> None:
        end = self.world.now + int(seconds * SECOND)
        self.world.after(seconds, lambda: None)  # time passes, whether something happens or not
        self.world.run(lambda: self.world.now >= end)


def test_it_learns_when_there_is_something_new_and_not_otherwise() -> None:
    site = Alone()
    site.wait(1000)
    assert site.rows() == {}
    assert [manifest.version for manifest in site.models] == [0], "who follows has the first one already"
    site.add(given(DATA[0]))
    site.wait(50)
    assert list(site.rows()) == [1], "the time of waiting was over"
    site.add(given(DATA[1], "b"))
    site.wait(5)
    assert list(site.rows()) == [1]
    site.wait(5000)
    assert list(site.rows()) == [1, 2]
    assert [row["samples"] for row in site.rows().values()] == [len(DATA[0]), len(DATA[0]) + len(DATA[1])]
    assert [row["status"] for row in site.rows().values()] == ["committed"] * 2
    assert [manifest.version for manifest in site.models] == [0, 1, 2]
    assert {call.phase for call in site.calls} == {wire.IDLE, wire.COLLECTING}
    assert not any(call.cohort or call.open for call in site.calls), "nobody is asked"


def test_many_new_examples_do_not_wait() -> None:
    site = Alone(fresh=10, share=0.5, every=1e6)
    site.wait(1)
    for k in range(3):
        site.add(given(DATA[0])[8 * k : 8 * k + 8])
        site.wait(100)
    assert [row["samples"] for row in site.rows().values()] == [16], "after the second eight; the last eight wait"
    site.add(given(DATA[1], "b")[:2])
    site.wait(100)
    assert [row["samples"] for row in site.rows().values()] == [16, 20], "ten new ones and as many of before"


def learned(fault: Fault | None) -> tuple[bytes, Alone]:
    site = Alone(fault=fault, share=0.3, fresh=10)
    for k in range(3):
        site.world.after(10 + 20 * k, site.add, given(DATA[k], "abc"[k]))
    site.wait(500)
    return msgspec.msgpack.decode(site.peer.disk["model"])["data"], site


MODEL, DIED = learned(counting := Deaths())


@pytest.mark.parametrize("point", range(counting.points))
def test_killed_anywhere_it_learns_the_same(point: int) -> None:
    died = Deaths([point])
    model, site = learned(died)
    assert died.points > point
    assert model == MODEL
    assert list(site.rows()) == list(DIED.rows()) == [1, 2, 3]
    assert [row["samples"] for row in site.rows().values()] == [row["samples"] for row in DIED.rows().values()]
    fits = [seed for trainer in site.trainers for seed in trainer.fits]
    lost = died.where[point].startswith("commit ") and len(fits) == 4  # of a training that was not committed
    assert len(fits) == 3 + lost
    assert len(set(fits)) == 3


def test_training_that_fails_is_told_and_tried_again_and_the_model_stays() -> None:
    class Diverges(Softmax):
        def fit(self, examples: Examples, plan: Fit) -> Fitted:
            super().fit(examples, plan)
            self._w["bias"][0] = np.nan
            return Fitted(1, 1.0)

    examples = ExampleStore(None)
    examples.add(given(DATA[0]))
    world = World(0)
    rules = Rules(job="j", rounds=FOREVER, fit=PLAN, retries=2)
    peer = world.add("solo", lambda: Solo(rules, Diverges(), Stock(examples), every=10.0))
    assert world.run(lambda: peer.over, seconds=1000)
    assert [(row["status"], row["version"]) for row in peer.rows] == [("aborted", 0)] * 3
    assert "not-finite" in peer.rows[0]["why"] or "infinite or none" in peer.rows[0]["why"]
    assert msgspec.msgpack.decode(peer.disk["job"])["outcome"] == "aborted"
    assert msgspec.msgpack.decode(peer.disk["model"])["round"] == 0


def test_a_model_that_is_worse_is_thrown_away() -> None:
    values = iter([0.9, 0.4, 0.88])
    rules = Rules(job="j", rounds=FOREVER, fit=PLAN, tolerance=0.05)
    site = Alone(rules, fresh=1, evaluate=lambda weights: {"accuracy": next(values)})
    site.wait(1)
    for k in range(3):
        site.add(given(DATA[k], "abc"[k]))
        site.wait(100)
    assert [row["status"] for row in site.rows().values()] == ["committed", "rejected", "committed"]
    assert [manifest.version for manifest in site.models] == [0, 1, 2]


def test_what_is_set_aside_is_evaluated_on_and_never_learned() -> None:
    examples = ExampleStore(None, held=0.5)
    examples.add(given(DATA[0]) + given(DATA[1], "b"))
    world = World(0)
    peer = world.add("solo", lambda: Solo(RULES, Softmax(), Stock(examples), every=1.0))
    world.run(lambda: bool(peer.rows), seconds=100)
    (row,) = peer.rows
    assert row["samples"] == len(examples.to_learn()) < len(examples)
    learner = Softmax()
    learner.load(wire.unpack_model(msgspec.msgpack.decode(peer.disk["model"])["data"], learner.form)[0])
    assert row["accuracy"] == learner.evaluate(examples.held_out())["accuracy"]


def test_a_second_leader_with_a_newer_epoch_ends_it_and_garbage_does_not() -> None:
    site = Alone()
    site.wait(1)
    for topic in ("round", "c/x/need", "c/x/ask", "c/x/up"):
        for payload in (b"", b"\xc1", b"\x80", msgspec.msgpack.encode({"type": "fl-round/1"})):
            answer: Answer = site.solo.heard(topic, payload, site.world.now)
            assert not answer.over
    call = wire.Call(job="j", run=1, epoch=site.solo.job.epoch + 1, round=1, phase=wire.IDLE, base="")
    assert site.solo.heard("round", wire.say(call), site.world.now).over
    assert site.solo.outcome == "fenced"


# -- replay of a client ---------------------------------------------------------------------------------------------


def test_a_client_learns_what_is_new_since_the_last_update_that_was_used() -> None:
    examples, world = ExampleStore(None), World(0)
    examples.add(given(DATA[0]))
    n = len(DATA[0])
    rules = Rules(job="j", rounds=4, fit=PLAN, deadline=30, grace=0.5)
    evaluations = iter([{"accuracy": 0.9}, {"accuracy": 0.1}, {"accuracy": 0.9}, {"accuracy": 0.9}, {"accuracy": 0.9}])
    rules = Rules(job="j", rounds=4, fit=PLAN, deadline=30, tolerance=0.1)
    stock = Stock(examples, 0.5)
    lead = world.add(
        "lead", lambda: Coordinator(rules, Mean(), Softmax().weights(), evaluate=lambda _: next(evaluations))
    )
    world.add("a", lambda: Client("j", "a", Softmax(), stock, lambda: len(stock)), took=lambda machine, work: 1.0)
    world.after(0.5, examples.add, given(DATA[1], "b")[:6])
    assert world.run(lambda: lead.over, seconds=1000)
    rows = {row["round"]: row for row in lead.rows}
    assert [(row["status"], row["samples"]) for row in rows.values()] == [
        ("committed", n),  # all is new
        ("rejected", 0),  # the six and six of before; but that model was thrown away
        ("committed", 12),  # so they are new again
        ("committed", n + 6),  # nothing is new: all
        ("committed", n + 6),
    ]


def test_numbers_of_examples_grow_whatever_is_removed(tmp_path: Path) -> None:
    store = ExampleStore(tmp_path / "x.sqlite")
    store.add(given(DATA[0], "a/"))
    store.add(given(DATA[1], "ab/"))
    last = int(store.numbered()[1].max())
    assert store.remove("ab/") == len(DATA[1])
    assert store.remove("ab/") == 0
    assert len(store) == store.learnable == len(store.to_learn()) == len(DATA[0])
    store.add(given(DATA[2], "c/"))
    assert store.came_after(last) == len(DATA[2])
    store.close()
    again = ExampleStore(tmp_path / "x.sqlite")
    assert again.counts() == {k: int((np.concatenate([DATA[0].y, DATA[2].y]) == k).sum()) for k in range(3)}
    again.close()


def test_what_is_removed_is_on_the_disk_no_more(tmp_path: Path) -> None:
    store = ExampleStore(tmp_path / "x.sqlite")
    secret = np.frombuffer(b"what nobody shall read again, 40 bytes..", np.uint8)
    store.add([Example("a/1", 1, secret, 0), Example("b/1", 1, secret[::-1].copy(), 0)])

    def files() -> bytes:
        return b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))

    assert secret.tobytes() in files()
    store.remove("a/")
    assert secret.tobytes() not in files()
    assert secret[::-1].tobytes() in files()
    store.close()


# -- as a user runs it ----------------------------------------------------------------------------------------------

NETWORK = "trainer: {mlp: {layers: [64, 32, 10], seed: 1}}"
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "federated"


def digits(folder: Path) -> None:
    """``old.npz`` with 0 to 4, ``new.npz`` with 5 to 9, and images of all that nobody learns."""
    found = [np.load(path) for path in sorted(EXAMPLE.glob("gateway-*.npz"))]
    images, labels = (np.concatenate([each[name] for each in found]) for name in ("images", "labels"))
    for name, rows in (("old", labels < 5), ("new", labels >= 5)):
        np.savez(folder / f"{name}.npz", images=images[rows], labels=labels[rows])
    with np.load(EXAMPLE / "held_out.npz") as held:
        np.savez(folder / "held_out.npz", images=held["images"], labels=held["labels"])
        old = held["labels"] < 5
        np.savez(folder / "held_old.npz", images=held["images"][old], labels=held["labels"][old])


def line(folder: Path, camera: str, train: str, *more: str, learns: str = "") -> Path:
    path = folder / "line.yaml"
    nodes = [
        "topology: line",
        "brokers: {local: {run: embedded}}",
        "nodes:",
        f"  camera: {{ingest: {{source: arrays, {camera}}}}}",
        f"  learn: {{train: {{job: digits, {NETWORK}, scale: 1/255, {train}}}, from: {{camera: {{delivery: safe}}}}{learns}}}",
    ]
    path.write_text("\n".join([*nodes, *more]) + "\n")
    return path


def learned_so_far(folder: Path, state: str = "state") -> list[dict[str, Any]]:
    try:
        return look(folder / state / "learn" / "digits.alone.sqlite")[0]
    except Exception:  # noqa: BLE001 - it is not there yet
        return []


def test_with_replay_it_still_knows_what_it_learned_before(tmp_path: Path) -> None:
    """0 to 4 on one day, 5 to 9 on the next, the same state: how well are 0 to 4 still told?"""
    digits(tmp_path)
    known = {}
    for replay in (0, 0.4):
        for day in ("old", "new"):
            alone = "alone: {fit: {epochs: 20}, evaluate: {path: held_old.npz, scale: 1/255}}"
            path = line(tmp_path, f"path: {day}.npz", f"policy: balanced, replay: {replay}, {alone}")
            outcome = run(path, state=tmp_path / f"state-{replay}-{day}") if day == "old" else None
            if outcome is None:  # another day's files, the same memory
                old, state = tmp_path / f"state-{replay}-old", tmp_path / f"state-{replay}-new"
                state.mkdir()
                (old / "learn").rename(state / "learn")
                for file in (state / "learn").glob("journal*"):
                    file.unlink()
                outcome = run(path, state=state)
            assert outcome.complete
            assert outcome.findings == []
            known[replay, day] = learned_so_far(tmp_path, f"state-{replay}-{day}")[-1]
    assert known[0, "old"]["accuracy"] > 0.9 < known[0.4, "old"]["accuracy"]
    assert known[0.4, "new"]["accuracy"] > 0.85
    assert known[0, "new"]["accuracy"] < 0.5
    assert known[0.4, "new"]["samples"] > known[0, "new"]["samples"]


@pytest.mark.campaign
def test_killed_while_it_learns_it_goes_on_and_infer_beside_it_follows(tmp_path: Path) -> None:
    digits(tmp_path)
    path = line(
        tmp_path,
        "path: held_out.npz, rate: 400, loop: true",
        "replay: 0.3, keep: 400, alone: {every: 100ms, fit: {batch: 16}}",
        "  test: {ingest: {source: arrays, path: held_out.npz, rate: 50, loop: true}}",
        f"  seen: {{infer: {{model: m.npz, job: digits, scale: 1/255, backend: {{trained: {{{NETWORK}}}}}}}, from: test}}",
        "  out: {uplink: {sink: jsonl, path: seen.jsonl}, from: seen}",
        learns=", process: learning",
    )

    async def kill(supervisor: Supervisor) -> None:
        for at in (3, 6, 9):
            await until(lambda at=at: len(learned_so_far(tmp_path)) >= at, within=40)  # type: ignore[misc] # its default
            supervisor.kill("learn")
        await until(lambda: len(learned_so_far(tmp_path)) >= 12, within=40)
        newest = f'"version":"{learned_so_far(tmp_path)[-1]["version"]}"'
        await until(lambda: newest in (tmp_path / "seen.jsonl").read_text(), within=40)
        supervisor.end()

    outcome = run(path, meddle=kill, within=58)
    assert outcome.complete
    rounds = learned_so_far(tmp_path)
    assert [row["round"] for row in rounds] == list(range(1, len(rounds) + 1))
    assert [row["version"] for row in rounds] == list(range(1, len(rounds) + 1)), "none is lost, none comes twice"
    assert {row["status"] for row in rounds} == {"committed"}


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (["alone: {every: 10 min}"], []),
        (["alone: {evry: 10 min}"], ["unknown key 'evry'; did you mean 'every'?"]),
        (["alone: {evaluate: none.npz}"], ["there is no file"]),
        (["replay: 1"], ["less than 1"]),
        (["held: -0.1"], ["expected at least 0, got -0.1"]),
        (["alone: {}", "alone: {}"], ["'a0' leads the job 'digits' already"]),
        (["alone: {}", ""], ["'a0' learns the job 'digits' alone, and asks no clients"]),
    ],
)
def test_what_is_wrong_is_said(nodes: list[str], said: list[str], tmp_path: Path) -> None:
    from nodes.plan import prepare
    from schemas.errors import ConfigError

    digits(tmp_path)
    lines = ["topology: t", "nodes:", "  camera: {ingest: {source: arrays, path: old.npz}}"]
    for k, options in enumerate(nodes):
        lines.append(f"  a{k}: {{train: {{job: digits, {NETWORK}, {options}}}, from: camera}}")
    path = tmp_path / "t.yaml"
    path.write_text("\n".join(lines) + "\n")
    found: list[str] = []
    try:
        prepare(path)
    except ConfigError as error:
        found = [str(line) for line in getattr(error, "lines", ())]
    assert len(found) == len(said), found
    for text in said:
        assert any(text in line for line in found), found


def test_personal_layers_do_not_go_with_learning_alone(tmp_path: Path) -> None:
    from nodes.plan import prepare
    from schemas.errors import ConfigError

    digits(tmp_path)
    path = line(tmp_path, "path: old.npz", "alone: {}")
    trainer = "trainer: {personal: {shared: [w1], trainer: {mlp: {layers: [64, 32, 10]}}}}"
    path.write_text(path.read_text().replace(NETWORK, trainer))
    with pytest.raises(ConfigError, match="personal"):
        prepare(path)
