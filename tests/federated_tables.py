"""``python tests/federated_tables.py TABLE``: the measured tables of docs/federated-strategies.md, as Markdown.

Digits of scikit-learn, rounds without a bus (:mod:`federated_kit`), one seed. ``strategies``: rounds to an accuracy with two
classes a client. ``robust``: three of ten clients send nonsense. ``bytes``: what an update takes on the wire. ``private``:
accuracy for an epsilon. ``krum``: what plain Krum loses, over several draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from federated_kit import (
    Data,
    Federation,
    Plan,
    Poison,
    accuracy,
    alike,
    digits,
    labels_turned,
    noise,
    perceptron,
    scaled,
    train,
    two_classes,
)

from nodes import kinds
from nodes.compressors._compressor import Compressor
from nodes.federated.weights import Weights, minus
from nodes.privacy.accountant import noise_for
from nodes.privacy.dp import Chance, central, local
from nodes.strategies._strategy import ClientUpdate, Strategy, mean
from schemas.codec import encode
from schemas.messages import Message, Update


def strategy(name: str, **options: Any) -> Strategy:
    module = kinds.module("strategy", name)
    made: Strategy = module.build(module.Config(**options))
    return made


def compressor(name: str, **options: Any) -> Compressor:
    module = kinds.module("compressor", name)
    made: Compressor = module.build(module.Config(**options))
    return made


def written(name: str, options: dict[str, Any]) -> str:
    """As in a topology."""
    inner = ", ".join(f"{key}: {value}" for key, value in options.items())
    return f"`{{{name}: {{{inner}}}}}`" if inner else f"`{name}`"


def on_the_wire(tensors: Weights) -> int:
    """Bytes of an ``update/1`` with all that belongs to it."""
    body = Update(
        job="digits", round=12, client="learn-a", base="ab" * 8, samples=144, tensors=tensors, metrics={"loss": 0.25}
    )
    return len(encode(Message("learn-a:1:12", "learn-a", 1_790_000_000_000_000_000, body)))


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


# -- rounds to an accuracy ------------------------------------------------------------------------------------------

GOALS = (0.90, 0.95, 0.97)
STRATEGIES: list[tuple[str, dict[str, Any]]] = [
    ("fedavg", {}),
    ("fedprox", {"proximal": 0.01}),
    ("fednova", {}),
    ("scaffold", {}),
    ("fedavgm", {}),
    ("fedadam", {"rate": 0.1}),
    ("fedyogi", {"rate": 0.1}),
    ("fedadagrad", {"rate": 0.1}),
    ("median", {}),
    ("trimmed-mean", {}),
    ("geometric-median", {}),
    ("krum", {"faulty": 3, "choose": 6}),
]


def strategies() -> Iterator[Sequence[str]]:
    yield "strategy", *(f"rounds to {100 * goal:.0f} %" for goal in GOALS), "best of 100 rounds"
    for name, options in STRATEGIES:
        curve = Federation(strategy(name, **options), two_classes(), perceptron(64, 32, 10, seed=1), Plan(2)).run(100)
        reached = [next((str(i + 1) for i, a in enumerate(curve) if a >= goal), "–") for goal in GOALS]
        yield written(name, options), *reached, percent(max(curve))


# -- three of ten send nonsense -------------------------------------------------------------------------------------

ROBUST_PLAN, ROBUST_ROUNDS = Plan(epochs=5, rate=0.2), 20
ATTACKS: dict[str, Callable[[int], Poison] | None] = {
    "nobody": None,
    "signs turned": lambda _: scaled(-1),
    "turned, × 10": lambda _: scaled(-10),
    "× 100": lambda _: scaled(100),
    "labels turned": None,  # of its data, see below
    "noise": lambda client: noise(1, client),
}
DEFENCES: list[tuple[str, dict[str, Any]]] = [
    ("fedavg", {}),
    ("median", {}),
    ("trimmed-mean", {"trim": 0.3}),
    ("krum", {"faulty": 3}),
    ("krum", {"faulty": 3, "choose": 6}),
    ("geometric-median", {}),
    ("bulyan", {"faulty": 1}),
]


def attacked(name: str, options: dict[str, Any], attack: str) -> float:
    """Accuracy in the end, with the first three of ten clients attacking."""
    parts: list[Data] = alike(10)
    if attack == "labels turned":
        parts = [labels_turned(part) if i < 3 else part for i, part in enumerate(parts)]
    poison = ATTACKS[attack]
    federation = Federation(
        strategy(name, **options),
        parts,
        perceptron(64, 32, 10, seed=1),
        ROBUST_PLAN,
        poison={} if poison is None else {i: poison(i) for i in range(3)},
    )
    with np.errstate(all="ignore"):  # a model that was carried off has scores without end
        return federation.run(ROBUST_ROUNDS)[-1]


def robust() -> Iterator[Sequence[str]]:
    yield "strategy", *ATTACKS
    for name, options in DEFENCES:
        yield written(name, options), *(percent(attacked(name, options, attack)) for attack in ATTACKS)


# -- what plain Krum loses, and to what -----------------------------------------------------------------------------

SETUPS = ((20, 5), (60, 5), (60, 1), (150, 1))
"""Rounds, and local epochs."""
DRAWS = 5


def drawn(name: str, options: dict[str, Any], attack: str, rounds: int, epochs: int, draw: int) -> float:
    """Accuracy in the end; parts, first weights and order of the rows are those of a draw."""
    whole = digits()[0]
    order = np.random.default_rng(draw).permutation(len(whole.y))
    poison = ATTACKS[attack]
    federation = Federation(
        strategy(name, **options),
        [Data(whole.x[order[i::10]], whole.y[order[i::10]]) for i in range(10)],
        perceptron(64, 32, 10, seed=1 + draw),
        Plan(epochs, rate=0.2),
        poison={} if poison is None else {i: poison(i) for i in range(3)},
        round=100_000 * draw,
    )
    return federation.run(rounds)[-1]


def krum() -> Iterator[Sequence[str]]:
    whom = [("fedavg", {}), ("krum", {"faulty": 3}), ("krum", {"faulty": 3, "choose": 6})]
    columns = [(name, options, attack) for name, options in whom for attack in ("nobody", "signs turned")]
    yield "rounds, local epochs", *(f"{written(name, options)}, {attack}" for name, options, attack in columns)
    for rounds, epochs in SETUPS:
        cells = []
        for name, options, attack in columns:
            seen = [drawn(name, options, attack, rounds, epochs, draw) for draw in range(DRAWS)]
            cells.append(f"{percent(float(np.mean(seen)))} ({percent(min(seen))} … {percent(max(seen))})")
        yield f"{rounds}, {epochs}", *cells


# -- bytes ----------------------------------------------------------------------------------------------------------

COMPRESSORS: list[tuple[str, dict[str, Any]]] = [
    ("fp16", {}),
    ("int8", {}),
    ("int4", {}),
    ("low-rank", {"rank": 2}),
    ("top-k", {"fraction": 0.1}),
    ("top-k", {"fraction": 0.01}),
]


def sizes() -> Iterator[Sequence[str]]:
    yield "compressor", "bytes of an update", "of float32", "rounds to 90 %", "rounds to 95 %"
    plain = on_the_wire(perceptron(64, 64, 10))
    for name, options in [("", {}), *COMPRESSORS]:
        made = compressor(name, **options) if name else None
        federation = Federation(strategy("fedavg"), two_classes(), perceptron(64, 64, 10, seed=1), Plan(epochs=2), made)
        curve = federation.run(150, until=0.95)
        reached = [next((str(i + 1) for i, a in enumerate(curve) if a >= goal), "–") for goal in (0.90, 0.95)]
        size = float(np.mean([on_the_wire(packed) for packed in federation.packed])) if made else plain
        yield written(name, options) if name else "none", f"{size:,.0f}", f"1/{plain / size:.1f}", *reached


# -- privacy --------------------------------------------------------------------------------------------------------

EPSILONS = (None, 8.0, 3.0, 1.0)
PRIVATE_PLAN, PRIVATE_ROUNDS, DELTA = Plan(rate=2.0), 40, 1e-5


def private_run(clients: int, where: str, epsilon: float | None) -> float:
    """Accuracy after all rounds, each with all clients; without an epsilon only clipped."""
    parts, model, chance = alike(clients), perceptron(64, 10, seed=1), Chance(1)
    noise = noise_for(epsilon, DELTA, PRIVATE_ROUNDS, local=where == "local") if epsilon else 0.0
    made, own = strategy("fedavg"), noise if where == "local" else 0.0
    for number in range(PRIVATE_ROUNDS):
        updates = []
        for i, part in enumerate(parts):
            delta = minus(train(model, part, PRIVATE_PLAN, 1000 * number + i)[0], model)
            if own:
                delta = local(delta, clip=1.0, noise=own, chance=chance)
            updates.append(ClientUpdate(f"c{i:03}", delta, len(part.y)))
        if own:  # clipped by their senders, and longer than that by the noise
            shared = ClientUpdate("all", mean(updates, [1.0] * clients), clients)
        else:
            shared = central(updates, clip=1.0, noise=noise, expected=clients, chance=chance)
        model = made.aggregate(model, [shared])
    return accuracy(model)


def private() -> Iterator[Sequence[str]]:
    yield "clients", "noise", *("without" if e is None else f"ε = {e:g}" for e in EPSILONS)
    for clients, where in ((100, "central"), (479, "central")):
        yield str(clients), where, *(percent(private_run(clients, where, e)) for e in EPSILONS)


TABLES = {"strategies": strategies, "robust": robust, "krum": krum, "bytes": sizes, "private": private}


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    for number, row in enumerate(TABLES[parser.parse_args().table]()):
        print(f"| {' | '.join(row)} |", flush=True)
        if not number:
            print(f"|{'---|' * len(row)}")


if __name__ == "__main__":
    main()
