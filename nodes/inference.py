"""The operator of ``infer``: batches of messages through one model.

Why ``blocking`` is measured: an invoke releases the GIL and must take it again. Run in a worker thread beside a busy
event loop, it waits for up to an interpreter switch interval (5 ms by default) to get it back, and 143,000 invokes/s of a tiny
model were seen to fall to 1,183. So a call that is over sooner than a hand-over costs stays in the loop's own thread; a batch
that takes longer than :data:`LONG` goes to a worker thread, in a process with a shorter interval (:mod:`nodes.runners`): there
the loop gets the next batch ready meanwhile, which was worth a seventh on the demo's model (batches of 256, two cores).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import ClassVar

import msgspec
import numpy as np

from nodes.backends._backend import Backend, Scaling, Signature, dequantise
from nodes.decoders._decoder import Answer, Decoder
from nodes.features import Gatherer, Item, UnfitError, missing
from nodes.operator import Emit, Operator
from schemas.errors import ConfigError
from schemas.messages import Array, Message, Model, Predictions, Readings

LONG = 0.0005
"""Seconds of one full batch from which the runtime calls :meth:`Infer.process` in a worker thread."""
_TRIALS = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What an :class:`Infer` is made of; the names are those of :class:`nodes.infer.Config`.

    :param version: ``""``: the first eight hex digits of the file's digest.
    :param backends: copies of the model; as many calls may be under way.
    :param wait: seconds to wait for a batch to fill.
    """

    path: Path
    name: str
    version: str
    backends: Sequence[Backend]
    decoder: Decoder
    fields: Sequence[str]
    keep: Sequence[str]
    batch: int
    wait: float
    scaling: Scaling | None = None


class Infer(Operator):
    """Frames, tensors or readings in; ``predictions/1`` out, one for each message, or for each row of readings.

    Rejects with the reasons ``bad-shape``, ``bad-dtype``, ``bad-encoding``, ``missing-field``, ``bad-type``, ``nan-input``
    and ``nan-output``.
    """

    overlaps: ClassVar[bool] = True

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._free: SimpleQueue[Backend] = SimpleQueue()
        self.calls = len(plan.backends)
        self.max_batch = plan.batch
        self.linger = plan.wait
        self._signature: Signature
        self._gatherer: Gatherer
        self._model: Model
        self._sizes: list[int] = []
        self.invoke_times: dict[int, float] = {}
        """Seconds of one invoke by batch size, as measured by :meth:`open`."""

    @property
    def model(self) -> Model:
        """Which model this is; known after :meth:`open`."""
        return self._model

    def open(self) -> None:
        """Load the model, try it on zeros and noise at every batch size, and measure.

        :raises MissingError: the runtime is not installed.
        :raises ConfigError: the model or the labels do not fit; the runtime refuses the file.
        """
        plan = self._plan
        try:
            with plan.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ConfigError(f"cannot read the model {plan.path}: {error.strerror}") from None
        self._model = Model(name=plan.name, version=plan.version or digest[:8], digest=digest)
        signatures = [backend.open() for backend in plan.backends]
        self._signature = signatures[0]
        plan.decoder.check(self._signature.outputs)
        self._gatherer = Gatherer(self._signature, plan.fields, plan.keep, plan.scaling)
        self._sizes = sizes(plan.batch) if self._signature.batch is None else [self._signature.batch]
        self._warm_up()

    def _warm_up(self) -> None:
        noise = np.random.default_rng(0)
        trials = []
        for n in self._sizes:
            inputs: dict[str, Array] = {}
            for spec in self._signature.inputs:
                value = np.zeros((n, *spec.shape), spec.dtype)
                if n == self._sizes[-1]:
                    # Real numbers only: noise among, say, token numbers may point outside a table.
                    if spec.dtype.kind == "f":
                        value[...] = noise.random(value.shape)
                    elif spec.quantisation is not None:
                        limits = np.iinfo(np.dtype(spec.dtype.str))
                        value[...] = noise.integers(limits.min, limits.max, value.shape, endpoint=True)
                inputs[spec.name] = value
            first, *others = self._plan.backends
            trials.append(self._real(first.infer(inputs)))
            spent = []
            for _ in range(_TRIALS):
                start = time.perf_counter()
                first.infer(inputs)
                spent.append(time.perf_counter() - start)
            self.invoke_times[n] = sorted(spent)[_TRIALS // 2]
            for other in others:
                other.infer(inputs)
        self._plan.decoder.tune({name: np.concatenate([trial[name] for trial in trials]) for name in trials[0]})
        calls = -(-self.max_batch // self._sizes[-1])
        self.blocking = self.calls > 1 or calls * self.invoke_times[self._sizes[-1]] > LONG
        for backend in self._plan.backends:
            self._free.put(backend)

    def process(self, messages: list[Message], edge: str, emit: Emit) -> None:
        """Take the messages apart, invoke, decode."""
        # Infinities and numbers too large for float32 are the sender's business and no reason to warn.
        with np.errstate(over="ignore", invalid="ignore"):
            self._process(messages, emit)

    def _process(self, messages: list[Message], emit: Emit) -> None:
        items, inputs, bad = self._gather(messages, emit)
        if not items:
            return
        if bad.any():
            good = self._refuse(
                items, bad, emit, "nan-input", "a value is missing (NaN); fill or filter it before infer"
            )
            items = [items[i] for i in good.tolist()]
            inputs = {name: value[good] for name, value in inputs.items()}
        most = self._sizes[-1]
        for start in range(0, len(items), most):
            part = slice(start, start + most)
            self._chunk(items[part], {name: value[part] for name, value in inputs.items()}, emit)

    def _gather(self, messages: list[Message], emit: Emit) -> tuple[list[Item], dict[str, Array], Array]:
        """What is to be inferred on, the model's inputs for all of it, and which of it has a NaN in it."""
        items: list[Item] = []
        inputs: dict[str, Array] = {}
        specs = self._signature.inputs
        try:
            if (same := self._gatherer.alike(messages)) is not None:
                inputs[specs[0].name], bad = self._gatherer.fit(same[1], specs[0], later=True)
                return same[0], inputs, bad
        except UnfitError:
            pass  # said of each, below
        for message in messages:
            try:
                items.extend(self._gatherer.items(message))
            except UnfitError as error:
                emit.reject(message, error.reason, error.detail)
        bad = np.zeros(len(items), np.bool_)
        if items:
            for spec in specs:
                inputs[spec.name], holes = self._gatherer.stacked(items, spec)
                bad |= holes
        return items, inputs, bad

    def _refuse(self, items: list[Item], bad: Array, emit: Emit, reason: str, detail: str) -> Array:
        """Dead-letter the bad ones; the places of the others."""
        for i in np.flatnonzero(bad).tolist():
            emit.reject(items[i].alone(), reason, detail)
        return np.flatnonzero(~bad)

    def _chunk(self, items: list[Item], inputs: dict[str, Array], emit: Emit) -> None:
        n = len(items)
        size = next(s for s in self._sizes if s >= n)
        if size > n:
            inputs = {
                name: np.concatenate((value, np.zeros((size - n, *value.shape[1:]), value.dtype)))
                for name, value in inputs.items()
            }
        backend = self._free.get()
        try:
            given = backend.infer(inputs, self._plan.scaling)
        finally:
            self._free.put(backend)
        outputs = self._real({name: value[:n] for name, value in given.items()})
        done = time.time_ns()
        bad = np.zeros(n, np.bool_)
        for value in outputs.values():
            bad |= missing(value)
        if bad.any():
            good = self._refuse(items, bad, emit, "nan-output", f"the model {self._model.name} answers NaN")
            if not len(good):
                return
            items = [items[i] for i in good.tolist()]
            outputs = {name: value[good] for name, value in outputs.items()}
        answers = self._plan.decoder.decode(outputs, [item.size for item in items])
        for item, answer in zip(items, answers, strict=True):
            emit.send(self._prediction(item, answer, done))

    def _real(self, outputs: dict[str, Array]) -> dict[str, Array]:
        """The outputs as the decoder wants them."""
        if self._plan.decoder.stored:
            return outputs
        return {spec.name: dequantise(outputs[spec.name], spec) for spec in self._signature.outputs}

    def _prediction(self, item: Item, answer: Answer, done: int) -> Message:
        message = item.message
        body = Predictions(
            model=self._model,
            seen=message.id,
            labels=answer.labels,
            scores=answer.scores,
            boxes=answer.boxes,
            values=answer.values,
            times={"ingest": message.born, "infer": done} if message.born else {"infer": done},
            attributes=item.attributes,
        )
        seen = message.body
        if item.row is None or not isinstance(seen, Readings):
            return message.derive(body)
        at = None if seen.time is None else int(seen.time[item.row])
        derived = message.derive(body, part=None if seen.n == 1 else item.row, time=at)
        return derived if seen.source is None else msgspec.structs.replace(derived, source=seen.source[item.row])

    def close(self) -> None:
        """Free the model."""
        for backend in self._plan.backends:
            backend.close()


def sizes(most: int) -> list[int]:
    """Batch sizes that are run: powers of two below ``most``, and ``most``; a batch is padded up to the next."""
    return [*(1 << i for i in range((most - 1).bit_length())), most]
