"""Where to cut a model between two machines: measured times of both parts, and what the link between them costs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import msgspec

from nodes.models import cut_onnx, cut_tflite
from nodes.models.cuts import Cut
from nodes.models.halves import compare, entry_bytes
from schemas.errors import ConfigError

MOST = 24
"""Cuts that are measured: evenly chosen among more."""


class Timed(msgspec.Struct, frozen=True):
    """Seconds of one item on one machine: the part before a cut, and the part behind it."""

    tensor: str
    bytes: int
    head: float
    tail: float


class Profile(msgspec.Struct, frozen=True):
    """A model on one machine.

    :param digest: sha256 (hex) of the model's file.
    :param entry: bytes of what one item is; ``answer``: of what comes out.
    :param whole: seconds of one item through all of it.
    """

    digest: str
    entry: int
    answer: int
    whole: float
    cuts: list[Timed]


@dataclass(frozen=True, slots=True)
class Link:
    """From this machine to the far one.

    :param rate: bytes a second; ``delay``: seconds one way.
    """

    rate: float
    delay: float

    def seconds(self, size: int) -> float:
        """Until so many bytes are there."""
        return self.delay + size / self.rate


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to share the work.

    :param name: ``all there``, a tensor, or ``all here``.
    :param bytes: that travel for one item; ``latency``: seconds of one item until the answer is on the far side.
    :param energy: joules of this machine for one item.
    """

    name: str
    bytes: int
    here: float
    travel: float
    there: float
    energy: float

    @property
    def latency(self) -> float:
        return self.here + self.travel + self.there


def module_of(path: Path) -> ModuleType:
    """What cuts such a file.

    :raises ConfigError: nothing does.
    """
    for module in (cut_onnx, cut_tflite):
        if path.suffix == module.SUFFIX:
            return module
    raise ConfigError(f"{path.name}: only .onnx and .tflite models can be cut")


def profile(path: Path, digest: str, tell: Callable[[int, int], None] = lambda done, of: None) -> Profile:
    """Measure the model and its parts on this machine, one item at a time.

    :param tell: called after each cut with how many are done, and of how many.
    :raises ConfigError: the file is no model that can be cut.
    :raises MissingError: what cuts or runs it is not installed.
    """
    module = module_of(path)
    cuts: list[Cut] = [cut for cut in module.cuts(path) if cut.bytes is not None]
    chosen = [cuts[i * len(cuts) // min(MOST, len(cuts))] for i in range(min(MOST, len(cuts)))]
    timed, wholes = [], []
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        head, tail = (Path(folder) / f"{part}{path.suffix}" for part in ("head", "tail"))
        for i, cut in enumerate(chosen):
            module.split(path, cut, head, tail)
            seen = compare(path, head, tail)
            wholes.append(seen.whole)
            timed.append(Timed(cut.tensor, cut.bytes or 0, seen.head, seen.tail))
            tell(i + 1, len(chosen))
    entry, answer, whole = entry_bytes(path)
    return Profile(digest, entry, answer, sorted(wholes)[len(wholes) // 2] if wholes else whole, timed)


def choices(here: Profile, there: Profile, link: Link, watts: float, joules: float) -> list[Choice]:
    """Every way, from all there to all here, in the model's order.

    :param watts: of this machine while it computes; ``joules``: for a megabyte that it sends.
    :raises ConfigError: the profiles are of different models.
    """
    if here.digest != there.digest:
        raise ConfigError("the two profiles are of different models")
    far: Mapping[str, Timed] = {timed.tensor: timed for timed in there.cuts}

    def choice(name: str, size: int, own: float, other: float) -> Choice:
        return Choice(name, size, own, link.seconds(size), other, own * watts + size / 1e6 * joules)

    parts = [
        choice(near.tensor, near.bytes, near.head, far[near.tensor].tail) for near in here.cuts if near.tensor in far
    ]
    return [choice("all there", here.entry, 0.0, there.whole), *parts, choice("all here", here.answer, here.whole, 0.0)]


AIMS: dict[str, Callable[[Choice], float]] = {
    "latency": lambda choice: choice.latency,
    "bytes": lambda choice: choice.bytes,
    "energy": lambda choice: choice.energy,
}


def best(ways: Sequence[Choice], aim: str) -> Choice:
    """The one with the least; of equal ones the faster."""
    return min(ways, key=lambda way: (AIMS[aim](way), way.latency))
