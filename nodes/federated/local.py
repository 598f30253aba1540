"""One client's part of one round: train on what it has, and make an update of it. Runs in the client's thread; keeps nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

from nodes.compressors._compressor import Compressor
from nodes.federated import wire
from nodes.federated.replay import Stock
from nodes.federated.weights import Shape, UnfitError, Weights, digest, fit, flat, minus, plus, taken_from
from nodes.trainers._trainer import Examples, Fit, Trainer
from schemas.errors import ConfigError, PenstockError
from schemas.messages import Array

Compressors = Callable[[Any], Compressor | None]
"""Makes the compressor that a call names; None of None."""

DEFAULT = Fit()
_FIT = {field.name for field in fields(Fit)} - {"correction", "seed"}


class NothingToLearnError(PenstockError):
    """There are no examples."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What a client carries from round to round.

    :param residual: what its compressor has left out so far (error feedback); empty: nothing.
    :param control: its control variate (SCAFFOLD); empty: zeros.
    :param own: what of the model never leaves the device.
    :param learned: the mark of its examples up to which they were learned, where it learns what is new (:class:`Stock`).
    """

    residual: Weights
    control: Weights
    own: Weights
    learned: int = 0

    def kept(self) -> dict[str, Any]:
        """Plain values for a commit."""
        arrays = {name: wire.plain(getattr(self, name)) for name in ("residual", "control", "own")}
        return {**arrays, "learned": self.learned}

    @classmethod
    def of(cls, kept: Mapping[str, Any] | None) -> Memory:
        """From :meth:`kept`; None: of a client that has done nothing yet."""
        kept = kept or {}
        residual, control, own = (wire.arrays(kept.get(name, {})) for name in ("residual", "control", "own"))
        return cls(residual, control, own, kept.get("learned", 0))

    def __bool__(self) -> bool:
        return bool(self.residual or self.control or self.own or self.learned)


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of it.

    :param payload: the bytes of the update.
    :param memory: what the client carries on from here if the update is used.
    """

    payload: bytes
    memory: Memory
    samples: int


@dataclass(frozen=True, slots=True)
class Shaped:
    """What came of it where only sums are seen: it leaves the device masked, and not before.

    :param values: all numbers of the delta, float64.
    :param base: digest of the model that it began with.
    """

    values: Array
    memory: Memory
    samples: int
    base: str


def split_task(task: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`Fit` in a call; ``control`` and ``alike`` (each client
    counts the same, whatever rows it has) are about this file.

    :raises ConfigError: it asks for something that this client does not know, and would silently not do.
    """
    if unknown := [name for name in task if name not in _FIT and name not in {"seed", "control", "alike"}]:
        raise ConfigError(f"the round asks for {', '.join(sorted(unknown))}, which this version does not know")
    return {name: value for name, value in task.items() if name in _FIT}


def train(
    call: wire.Call,
    client: str,
    data: bytes | memoryview,
    wanted: tuple[Shape, ...],
    trainer: Trainer,
    examples: Callable[[], Examples],
    compressors: Compressors,
    memory: Memory,
    time: int,
) -> Trained | Shaped:
    """Train one round.

    :param data: the bytes of the model that the call names.
    :param wanted: the trainer's form.
    :raises PayloadError: ``data`` is no model.
    :raises UnfitError: it is not this trainer's, or not the one that the call names, or training gave no numbers.
    :raises ConfigError: the call asks for what this client cannot do.
    :raises NothingToLearnError: there are no examples.
    """
    plan = split_task(call.fit)
    if call.secure and (call.compress is not None or call.evaluate or "control" in call.fit):
        raise ConfigError("the round asks for a secure sum, and for what cannot be masked beside it")
    model, shared = wire.unpack_model(data, wanted)
    if digest(model) != call.base:
        raise UnfitError("base", "the model that came is not the one that the round begins with")
    seed = wire.seed_of(int(call.fit.get("seed", 0)), call.round, client)
    known, aside, learned = _drawn(examples, memory.learned, seed)
    if not len(known) and not trainer.content:
        raise NothingToLearnError("there are no examples")
    trainer.load(model)
    trainer.keep(memory.own)
    metrics = dict(trainer.evaluate(aside if len(aside) else known)) if call.evaluate else {}
    control = _control(call.fit)
    if control and call.private:
        raise ConfigError("the round asks for arrays beside a private update, which would have no noise")
    correction = control.correction(shared, memory.control, model) if control else {}
    done = trainer.fit(known, Fit(**plan, seed=seed, correction=correction))
    if not math.isnan(done.loss):
        metrics["train_loss"] = done.loss
    metrics["steps"] = float(done.steps)
    delta = taken_from(trainer.weights(), model)
    fit(delta, wanted)
    extra, ours = {}, memory.control
    if control:
        extra = control.change(delta, shared, done.steps, float(plan.get("rate", DEFAULT.rate)))
        ours = control.adopted(memory.control, extra)
    if call.private:  # nothing else is told
        delta, metrics = _hidden(delta, call.private, call.secure), {}
    if call.secure:
        return Shaped(flat(delta), Memory({}, ours, trainer.own(), learned), len(known), call.base)
    packed, residual = _pack(delta, memory.residual, compressors(call.compress), wanted, seed)
    payload = wire.pack_update(
        call.job,
        call.run,
        call.round,
        client,
        base=call.base,
        samples=1 if call.private or call.fit.get("alike") else len(known),
        packed=packed,
        extra=extra,
        metrics=wire.finite(metrics),
        time=time,
    )
    return Trained(payload, Memory(residual, ours, trainer.own(), learned), len(known))


def _drawn(examples: Callable[[], Examples], learned: int, seed: int) -> tuple[Examples, Examples, int]:
    """What is learned from, what is evaluated on instead where some is set aside, and the mark that goes with them."""
    if not isinstance(examples, Stock):
        known = examples()
        return known, known, 0
    if not examples.marks:
        return examples(), examples.held_out(), 0
    known, mark = examples.learn(learned, seed)
    return known, examples.held_out(), mark


def _hidden(delta: Weights, private: Mapping[str, Any], secure: Mapping[str, Any]) -> Weights:
    """The delta as it may leave: with noise of our own, where that is asked; the coordinator's is added there, and it is
    shortened there unless only its sum with others is seen.

    :raises ConfigError: this version does not know what is asked, and would send more than it may.
    """
    match private.get("where"):
        case "central" if secure:
            return _short(delta, private, secure)
        case "central":
            return delta
        case "local":
            from nodes.privacy.dp import Chance, local

            try:
                clip, noise, by_tensor = float(private["clip"]), float(private["noise"]), bool(private["by_tensor"])
            except (KeyError, TypeError, ValueError):
                raise ConfigError("the round asks for noise, and does not say for how much") from None
            if not (0 < clip < math.inf and 0 < noise < math.inf):
                raise ConfigError(f"the round asks for noise of {noise:g} times {clip:g}")
            return local(delta, clip=clip, noise=noise, chance=Chance(), by_tensor=by_tensor)
        case other:
            raise ConfigError(f"the round asks for privacy {str(other)[:32]!r}, which this version does not know")


def _short(delta: Weights, private: Mapping[str, Any], secure: Mapping[str, Any]) -> Weights:
    """The delta, no longer than the round's noise is made for, also after it was rounded for the sum.

    :raises ConfigError: it is not said, or rounding alone is as long.
    """
    from nodes.privacy.dp import clipped
    from nodes.privacy.fixed_point import FixedPoint

    try:
        most, by_tensor = float(private["clip"]), bool(private["by_tensor"])
        step = FixedPoint(int(secure["clients"]), float(secure["clip"]), int(secure["most"])).step
    except (KeyError, TypeError, ValueError):
        raise ConfigError("the round asks for short updates, and does not say how short") from None
    rounding = step / 2 * math.sqrt(sum(array.size for array in delta.values()))
    if not 0 < rounding < most / 2 < math.inf:
        raise ConfigError(f"the round asks for updates of {most:g}, and rounds them by up to {rounding:g}")
    return clipped(delta, most - rounding, by_tensor=by_tensor)


def _pack(
    delta: Weights, residual: Weights, compressor: Compressor | None, wanted: tuple[Shape, ...], seed: int
) -> tuple[Weights, Weights]:
    """What travels, and what is left for the next time."""
    if compressor is None:
        return delta, {}
    if not compressor.feeds_back:
        return compressor.pack(delta, seed), {}
    total = plus(delta, residual) if residual else delta
    packed = compressor.pack(total, seed)
    return packed, minus(total, compressor.unpack(packed, wanted))


def _control(task: Mapping[str, Any]) -> ModuleType | None:
    """Who knows what the client does beside training: ``correction``, ``change`` and ``adopted``."""
    match task.get("control"):
        case None:
            return None
        case "scaffold":
            from nodes.strategies import scaffold

            return scaffold
        case other:
            raise ConfigError(f"the round asks for control {other!r}, which this version does not know")
