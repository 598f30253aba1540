"""What is done in a drill, and when: from what the user asked for, and a seed."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nodes.drill import fault
from nodes.drill.fault import Blow, Ground
from schemas.errors import ConfigError

SHARE = 0.75
"""Of the time that the data last: within it the blows fall, so that the last one is got over while there are data."""
_REST = 1.5
"""Seconds after a blow that are reckoned for getting up again."""
_SHORTEST = 0.3
"""A blow is shortened to this share of its usual length at most."""
_WANTED = re.compile(r"([a-z][a-z-]*)(?::([^=]+))?(?:=(.*))?")


@dataclass(frozen=True)
class Wanted:
    """A fault that the user asked for.

    :param target: a node or broker; None: whatever one round of it strikes.
    :param rounds: how often.
    """

    fault: str
    target: str | None = None
    rounds: int = 1


def parse(text: str) -> Wanted:
    """``NAME[:TARGET][=N]``, as written after ``--fault``.

    :raises ConfigError: it is not, or there is no such fault.
    """
    found = _WANTED.fullmatch(text)
    if found is None:
        raise ConfigError(f"--fault: expected NAME, NAME=TIMES or NAME:TARGET, got {text!r}")
    name, target, times = found.groups()
    module = fault.module(name)
    if times is not None and not (times.isdecimal() and 0 < int(times) <= 1000):
        raise ConfigError(f"--fault {name}: expected how many times, 1 to 1000, got {times!r}")
    if target is not None and not hasattr(module, "chosen"):
        raise ConfigError(f"--fault {name}: it strikes everything at once and takes no target")
    return Wanted(name, target, int(times or 1))


def choose(given: Sequence[str], ground: Ground) -> tuple[list[Wanted], dict[str, str]]:
    """What is to be done, and what is not, with the reason.

    :param given: as written after ``--fault``; empty: everything that can be done here.
    :raises ConfigError: what was asked for is not there or cannot be done here.
    """
    if not given:
        reasons = {name: fault.module(name).why_not(ground) for name in fault.names()}
        return [Wanted(name) for name, why in reasons.items() if why is None], {n: w for n, w in reasons.items() if w}
    out = []
    for wanted in map(parse, given):
        module = fault.module(wanted.fault)
        if wanted.target is not None:
            wanted = Wanted(wanted.fault, module.chosen(ground, wanted.target), wanted.rounds)
        if why := module.why_not(ground):
            raise ConfigError(f"--fault {wanted.fault}: {why}")
        out.append(wanted)
    return out, {}


def all_blows(wanted: Sequence[Wanted], ground: Ground) -> list[Blow]:
    """Every blow at its usual length, in no order yet."""
    out = []
    for one in wanted:
        module = fault.module(one.fault)
        targets = module.targets(ground) if one.target is None else [one.target]
        out += [Blow(one.fault, target, module.SECONDS) for _ in range(one.rounds) for target in targets]
    return out


def least(blows: Sequence[Blow]) -> float:
    """Seconds of data that these blows need, at their usual length."""
    return sum(blow.seconds + _REST for blow in blows) / SHARE


def schedule(blows: Sequence[Blow], seed: int, seconds: float) -> list[tuple[float, Blow]]:
    """The blows in an order drawn from the seed, each with the earliest moment, in seconds after the start.

    :param seconds: how long the data last.
    :raises ConfigError: there are too many for that.
    """
    draw = random.Random(f"drill/{seed}")  # noqa: S311 - faults, not secrets
    share = SHARE * seconds
    usual, rest = sum(blow.seconds for blow in blows), _REST * len(blows)
    shrink = 1.0 if not usual else min(1.0, max(0.0, share - rest) / usual)
    if blows and shrink < _SHORTEST:
        least_seconds = (usual * _SHORTEST + rest) / SHARE
        raise ConfigError(
            f"--for {seconds:g}s is too short for {len(blows)} blows, which need at least {least_seconds:.0f}s;"
            " or name fewer with --fault"
        )
    order = [Blow(b.fault, b.target, round(b.seconds * shrink, 2)) for b in draw.sample(list(blows), len(blows))]
    weights = [draw.uniform(0.5, 1.0) for _ in order]
    slack = max(0.0, share - rest - sum(blow.seconds for blow in order))
    out, at = [], 0.0
    for blow, weight in zip(order, weights, strict=True):
        at += slack * weight / sum(weights)
        out.append((round(at, 2), blow))
        at += blow.seconds + _REST
    return out
