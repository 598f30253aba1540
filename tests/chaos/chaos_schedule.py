"""What is done to a run, and when: drawn from a seed before anything starts."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

NODES = ("meter", "warm", "means", "store", "report")
BROKER = "broker"
VICTIMS = (*NODES, BROKER)


@dataclass(frozen=True)
class Blow:
    """One fault.

    :ivar after: readings that are to reach the sink between the blow before and this one; it waits for one at least.
    :ivar kind: ``kill`` is SIGKILL; ``cut`` breaks every connection to the broker and refuses new ones.
    :ivar victim: whom it kills; a cut has none.
    :ivar twice: it is killed again as soon as its next process has begun, before that one is ready.
    :ivar seconds: how long a cut lasts.
    :ivar silent: the cut begins with silence, so that what is under way on the wire is lost.
    """

    after: int
    kind: Literal["kill", "cut"]
    victim: str = ""
    twice: bool = False
    seconds: float = 0.0
    silent: bool = False

    def __str__(self) -> str:
        what = (
            self.victim + " twice" * self.twice
            if self.kind == "kill"
            else f"{self.seconds:.1f} s{' of silence first' * self.silent}"
        )
        return f"+{self.after} {self.kind} {what}"


def schedule(seed: int, broker: str, kept: int, rounds: int, cuts: int, span: float = 0.7) -> list[Blow]:
    """The blows of one run, in order. Equal arguments give equal schedules, on any machine.

    Every round kills every victim once, in an order of its own.

    :param broker: name of the broker's kind, so that each has a schedule of its own.
    :param kept: readings that will reach the sink.
    :param span: share of these within which the blows fall, so that the data do not end before the last is got over.
    """
    draw = random.Random(f"{seed}/{broker}")
    blows: list[Blow] = []
    for _ in range(rounds):
        order = draw.sample(VICTIMS, len(VICTIMS))
        blows += [Blow(0, "kill", v, twice=rounds > 1 and v != BROKER and draw.random() < 0.2) for v in order]
    for _ in range(cuts):
        cut = Blow(0, "cut", "", False, round(draw.uniform(0.2, 1.5), 1), draw.random() < 0.5)
        blows.insert(draw.randrange(len(blows) + 1), cut)
    weights = [draw.uniform(0.2, 1.0) for _ in blows]
    unit = span * kept / sum(weights)
    return [replace(blow, after=max(1, int(weight * unit))) for blow, weight in zip(blows, weights, strict=True)]
