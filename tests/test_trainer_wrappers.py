"""Trainers around a trainer: layers that stay on the device, and distillation from what others predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federated_kit import alike, digits

from nodes import kinds
from nodes.federated import wire
from nodes.federated.local import Memory, Trained, train
from nodes.federated.weights import UnfitError, Weights, digest, minus, plus, shapes
from nodes.operator import Context
from nodes.strategies._strategy import ClientUpdate, mean
from nodes.trainers._trainer import Examples, Fit, Trainer
from schemas.errors import ConfigError
from schemas.problems import validated

CLASSES = 10
FIT = Fit(epochs=2, batch=16, rate=0.1)


def made(folder: Path, name: str, **options: Any) -> Trainer:
    module = kinds.module("trainer", name)
    context = Context("line", "learn", folder, folder)
    config = validated(module.Config, options)
    config.check(context)
    trainer: Trainer = module.build(config, context)
    trainer.open()
    return trainer


def rounds(
    trainers: Sequence[Trainer], data: Sequence[Examples], count: int, plan: Fit = FIT
) -> tuple[Weights, list[Weights]]:
    """Federated averaging without a bus, as a client does it: load, keep, fit, own."""
    model, owns = trainers[0].weights(), [Weights()] * len(trainers)
    for number in range(count):
        updates = []
        for i, (trainer, part) in enumerate(zip(trainers, data, strict=True)):
            trainer.load(model)
            trainer.keep(owns[i])
            trainer.fit(part, replace(plan, seed=number * 100 + i))
            updates.append(ClientUpdate(str(i), minus(trainer.weights(), model), len(part)))
            owns[i] = trainer.own()
        model = plus(model, mean(updates, [update.samples for update in updates]))
    return model, owns


def accuracies(
    trainers: Sequence[Trainer], model: Weights, owns: Sequence[Weights], tests: Sequence[Examples]
) -> list[float]:
    out = []
    for trainer, own, test in zip(trainers, owns, tests, strict=True):
        trainer.load(model)
        trainer.keep(own)
        out.append(trainer.evaluate(test)["accuracy"])
    return out


def test_devices_that_mean_different_things_share_all_but_their_last_layer(tmp_path: Path) -> None:
    """Half of them number the digits the other way round: no one model is right for both; a shared body with own heads is."""
    _, test = digits()
    turned = [i % 2 == 1 for i in range(6)]

    def seen(x: Any, y: Any, other: bool) -> Examples:
        return Examples(x, CLASSES - 1 - y if other else y)

    data = [seen(part.x, part.y, other) for part, other in zip(alike(6), turned, strict=True)]
    tests = [seen(test.x, test.y, other) for other in turned]
    network = {"mlp": {"layers": [64, 32, 10], "seed": 1}}
    own = [made(tmp_path, "personal", trainer=network, layers=["w2", "b2"]) for _ in data]
    assert list(own[0].weights()) == ["w1", "b1"]
    assert list(own[0].own()) == ["w2", "b2"]
    same = [made(tmp_path, "mlp", **network["mlp"]) for _ in data]
    assert min(accuracies(own, *rounds(own, data, 12), tests)) >= 0.9
    assert max(accuracies(same, *rounds(same, data, 12), tests)) <= 0.7


def test_own_layers_are_kept_and_reset(tmp_path: Path) -> None:
    network = {"mlp": {"layers": [64, 16, 10]}}
    trainer = made(tmp_path, "personal", trainer=network, layers=["w2"])
    first, part = trainer.own(), alike(6)[0]
    trainer.fit(Examples(part.x, part.y), FIT)
    after = trainer.own()
    assert not np.array_equal(first["w2"], after["w2"])
    trainer.keep({})
    assert np.array_equal(trainer.own()["w2"], first["w2"])
    trainer.keep(after)
    assert np.array_equal(trainer.own()["w2"], after["w2"])
    with pytest.raises(UnfitError):
        trainer.keep({"w2": after["w2"][1:]})
    with pytest.raises(UnfitError):
        trainer.load({"w1": np.zeros((64, 16), np.float32)})


@pytest.mark.parametrize(
    ("layers", "wrong"), [(["w9"], "no 'w9'; it has w1, b1, w2, b2"), (["w1", "b1", "w2", "b2"], "no layer is left")]
)
def test_own_layers_that_there_are_not(tmp_path: Path, layers: list[str], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        made(tmp_path, "personal", trainer={"mlp": {"layers": [64, 16, 10]}}, layers=layers)


def test_devices_with_different_models_teach_each_other(tmp_path: Path) -> None:
    """Forty images each, three kinds of networks: what they predict on public images is all that they exchange."""
    train, test = digits()
    np.savez(tmp_path / "public.npz", x=train.x[1000:])
    data = [Examples(train.x[i:240:6], train.y[i:240:6]) for i in range(6)]
    tests = [Examples(test.x, test.y)] * 6
    networks = [
        {"mlp": {"layers": [64, *hidden, 10], "seed": i}} for i, hidden in enumerate([[48], [16], [32, 16]] * 2)
    ]
    taught = [made(tmp_path, "distil", trainer=each, public="public.npz", epochs=3) for each in networks]
    assert taught[0].weights()["predictions"].shape == (437, CLASSES)
    plan = Fit(epochs=10, batch=8, rate=0.1)
    together = accuracies(taught, *rounds(taught, data, 10, plan), tests)
    alone = []
    for each, part in zip(networks, data, strict=True):
        one = made(tmp_path, "mlp", **each["mlp"])
        for number in range(10):
            one.fit(part, replace(plan, seed=number))
        alone.append(one.evaluate(tests[0])["accuracy"])
    assert float(np.mean(together)) >= float(np.mean(alone)) + 0.05, (together, alone)
    assert min(together) >= min(alone) + 0.1, (together, alone)


def test_distillation_begins_with_nothing_known_and_continues(tmp_path: Path) -> None:
    train, _ = digits()
    np.savez(tmp_path / "public.npz", x=train.x[:20])
    trainer = made(tmp_path, "distil", trainer={"mlp": {"layers": [64, 10]}}, public="public.npz")
    begun = trainer.weights()
    assert np.all(begun["predictions"] == np.float32(0.1))
    part = Examples(train.x[20:80], train.y[20:80])
    trainer.fit(part, Fit(epochs=0))
    assert np.array_equal(trainer.weights()["predictions"], begun["predictions"])
    trainer.fit(part, FIT)
    said, model = trainer.weights(), trainer.own()
    again = made(tmp_path, "distil", trainer={"mlp": {"layers": [64, 10]}}, public="public.npz")
    again.load(said)
    again.keep(model)
    assert np.array_equal(again.predict(part.x), trainer.predict(part.x))


@pytest.mark.parametrize(
    ("options", "wrong"),
    [({"public": "none.npz"}, "no such file"), ({"public": "public.npz", "inputs": "z"}, "no 'z'; it has x"),
     ({"public": "text.npz"}, "cannot be read")],
)  # fmt: skip
def test_public_examples_that_there_are_not(tmp_path: Path, options: dict[str, str], wrong: str) -> None:
    np.savez(tmp_path / "public.npz", x=np.zeros((3, 64)))
    (tmp_path / "text.npz").write_text("no such thing")
    with pytest.raises(ConfigError, match=wrong):
        made(tmp_path, "distil", trainer={"mlp": {"layers": [64, 10]}}, **options)


def test_neither_can_be_corrected(tmp_path: Path) -> None:
    np.savez(tmp_path / "public.npz", x=np.zeros((3, 64)))
    network = {"mlp": {"layers": [64, 10]}}
    part = Examples(np.zeros((2, 64), np.float32), np.zeros(2, np.int64))
    for trainer in (
        made(tmp_path, "distil", trainer=network, public="public.npz"),
        made(tmp_path, "personal", trainer=network, layers=["b1"]),
    ):
        with pytest.raises(ConfigError, match="SCAFFOLD"):
            trainer.fit(part, Fit(correction=trainer.weights()))


def test_what_a_device_keeps_outlives_its_client(tmp_path: Path) -> None:
    """Two rounds of one client, and the same with another trainer and what was committed between them: the same update."""
    network = {"mlp": {"layers": [64, 16, 10], "seed": 2}}
    part = alike(6)[0]

    def client(before: dict[str, Any] | None, trainer: Trainer, number: int) -> Trained:
        model = first.weights()
        call = wire.Call(
            job="job", run=1, epoch=1, round=number, phase=wire.COLLECTING, base=digest(model),
            fit={"epochs": 1, "batch": 16, "rate": 0.1},
        )  # fmt: skip
        data, form = wire.pack_model(model, {}), shapes(model)
        seen = Examples(part.x, part.y)
        done = train(call, "c", data, form, trainer, lambda: seen, lambda _: None, Memory.of(before), 7)
        assert isinstance(done, Trained)
        return done

    first = made(tmp_path, "personal", trainer=network, layers=["w2", "b2"])
    same, other = (made(tmp_path, "personal", trainer=network, layers=["w2", "b2"]) for _ in range(2))
    kept = client(None, same, 1).memory.kept()
    assert set(kept["own"]) == {"w2", "b2"}
    on, again = client(kept, same, 2), client(kept, other, 2)
    assert on.payload == again.payload
    assert on.payload != client(None, other, 2).payload
