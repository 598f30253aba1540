"""Replay of stored examples: how many, of which classes, and that less is forgotten."""

from __future__ import annotations

import numpy as np
import pytest

from nodes.federated.replay import replayed
from nodes.trainers._trainer import Examples, Fit
from nodes.trainers.mlp import Mlp


def made(labels: list[int], start: int = 0) -> Examples:
    return Examples(np.arange(start, start + len(labels), dtype=np.float32)[:, None], np.asarray(labels))


def test_the_share_is_that_of_the_whole() -> None:
    fresh, stored = made([0] * 60), made([1] * 500, 1000)
    for share, old in ((0.0, 0), (0.25, 20), (0.5, 60), (0.75, 180), (0.99, 500)):
        mixed = replayed(fresh, stored, share, 1)
        assert len(mixed) == 60 + old
        assert np.array_equal(mixed.x[:60], fresh.x)
        assert len(np.unique(mixed.x)) == len(mixed)  # no row twice
    assert len(replayed(fresh, made([]), 0.5, 1)) == 60
    assert len(replayed(made([]), stored, 0.5, 1)) == 500


def test_classes_take_turns() -> None:
    stored = made([0] * 1000 + [1] * 30 + [2] * 5)
    mixed = replayed(made([7] * 60), stored, 0.5, 3)
    assert np.bincount(mixed.y[60:]).tolist() == [28, 27, 5] or np.bincount(mixed.y[60:]).tolist() == [27, 28, 5]
    rows = {float(x): int(y) for x, y in zip(stored.x.ravel(), stored.y, strict=True)}
    assert all(rows[float(x)] == y for x, y in zip(mixed.x[60:].ravel(), mixed.y[60:], strict=True))


def test_it_is_drawn_by_its_seed() -> None:
    fresh, stored = made([0] * 10), made([0, 1] * 100)
    assert np.array_equal(replayed(fresh, stored, 0.5, 1).x, replayed(fresh, stored, 0.5, 1).x)
    assert not np.array_equal(replayed(fresh, stored, 0.5, 1).x, replayed(fresh, stored, 0.5, 2).x)
    numbers = Examples(stored.x, stored.x[:, 0])
    assert len(replayed(Examples(fresh.x, fresh.x[:, 0]), numbers, 0.5, 1)) == 20
    with pytest.raises(ValueError, match="share"):
        replayed(fresh, stored, 1.0, 1)


def test_less_is_forgotten() -> None:
    """First the digits 0 to 4, then 5 to 9 alone: without replay the first are gone."""
    datasets = pytest.importorskip(
        "sklearn.datasets", reason="scikit-learn is not installed: its digits are not learned"
    )
    data = datasets.load_digits()
    mixed = np.random.default_rng(0).permutation(len(data.data))
    x, y = (data.data[mixed] / 16).astype(np.float32), data.target[mixed].astype(np.int64)
    train, held = Examples(x[:1347], y[:1347]), Examples(x[1347:], y[1347:])

    def part(examples: Examples, low: int, high: int) -> Examples:
        rows = (examples.y >= low) & (examples.y < high)
        return Examples(examples.x[rows], examples.y[rows])

    old, new = part(train, 0, 5), part(train, 5, 10)
    found = {}
    for share in (0.0, 0.3):
        model = Mlp([64, 32, 10], seed=1)
        model.open()
        model.fit(old, Fit(epochs=20))
        for turn in range(20):
            model.fit(replayed(new, old, share, turn), Fit(seed=turn))
        found[share] = model.evaluate(part(held, 0, 5))["accuracy"], model.evaluate(part(held, 5, 10))["accuracy"]
    assert found[0.0][0] < 0.5
    assert min(found[0.3]) > 0.9
