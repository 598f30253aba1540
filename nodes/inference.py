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
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, TypeAlias

import msgspec
import numpy as np

from nodes.backends._backend import given
from nodes.decoders._decoder import Answer
from nodes.features import Item, UnfitError, missing
from nodes.loaded import Loaded, Plan
from nodes.operator import Emit, Operator
from schemas.errors import ConfigError
from schemas.messages import Array, Body, Message, Model, Predictions, Readings, Tensors

LONG = 0.0005
"""Seconds of one full batch from which the runtime calls :meth:`Infer.process` in a worker thread."""

Follow: TypeAlias = Callable[["Infer"], Coroutine[Any, Any, None]]
"""Runs beside the operator, and calls :meth:`Infer.exchange` when there is a newer model."""


class Infer(Operator):
    """Frames, tensors or readings in; ``predictions/1`` out (or ``tensors/1``, where the decoder passes them on), one for each
    message, or for each row of readings.

    Rejects with the reasons ``bad-shape``, ``bad-dtype``, ``bad-encoding``, ``missing-field``, ``bad-type``, ``nan-input``
    and ``nan-output``.
    """

    overlaps: ClassVar[bool] = True

    def __init__(self, plan: Plan, follow: Follow | None = None) -> None:
        self._plan = plan
        self._follow = follow
        self._loaded: Loaded
        self._swap = Lock()
        self._users: Counter[Loaded] = Counter()
        self.max_batch = plan.batch
        self.linger = plan.wait

    @property
    def model(self) -> Model:
        """Which model this is; known after :meth:`open`."""
        return self._loaded.model

    @property
    def invoke_times(self) -> dict[int, float]:
        """Seconds of one invoke by batch size, as measured when the model was loaded."""
        return self._loaded.invoke_times

    def open(self) -> None:
        """Load the model, try it on zeros and noise at every batch size, and measure.

        :raises MissingError: the runtime is not installed.
        :raises ConfigError: the model or the labels do not fit; the runtime refuses the file.
        """
        plan = self._plan
        loaded = self._loaded = Loaded(plan, plan.path, named(plan, plan.path))
        self.calls = loaded.copies
        calls = -(-self.max_batch // loaded.sizes[-1])
        self.blocking = self.calls > 1 or calls * loaded.invoke_times[loaded.sizes[-1]] > LONG

    async def beside(self) -> None:
        """Wait for newer models, if there is a place that they come from."""
        if self._follow is not None:
            await self._follow(self)

    def exchange(self, path: Path, model: Model) -> None:
        """Answer with another model from the next batch on. Takes as long as loading does; in any thread, one at a time.

        Calls that are under way end with the model that they began with.

        :raises PenstockError: it does not load, or does not fit; the old one stays.
        """
        loaded = Loaded(self._plan, path, model)
        with self._swap:
            old, self._loaded = self._loaded, loaded
            idle = not self._users[old]
        if idle:
            old.close()

    @contextmanager
    def _using(self) -> Iterator[Loaded]:
        """The model, which stays open until we are done with it."""
        with self._swap:
            loaded = self._loaded
            self._users[loaded] += 1
        try:
            yield loaded
        finally:
            with self._swap:
                self._users[loaded] -= 1
                left = not self._users[loaded] and loaded is not self._loaded
                if left:
                    del self._users[loaded]
            if left:
                loaded.close()

    def process(self, messages: list[Message], edge: str, emit: Emit) -> None:
        """Take the messages apart, invoke, decode."""
        # Infinities and numbers too large for float32 are the sender's business and no reason to warn.
        with np.errstate(over="ignore", invalid="ignore"), self._using() as loaded:
            self._process(loaded, messages, emit)

    def _process(self, loaded: Loaded, messages: list[Message], emit: Emit) -> None:
        items, inputs, bad = self._gather(loaded, messages, emit)
        if not items:
            return
        if bad.any():
            good = self._refuse(
                items, bad, emit, "nan-input", "a value is missing (NaN); fill or filter it before infer"
            )
            items = [items[i] for i in good.tolist()]
            inputs = {name: value[good] for name, value in inputs.items()}
        most = loaded.sizes[-1]
        for start in range(0, len(items), most):
            part = slice(start, start + most)
            self._chunk(loaded, items[part], {name: value[part] for name, value in inputs.items()}, emit)

    def _gather(
        self, loaded: Loaded, messages: list[Message], emit: Emit
    ) -> tuple[list[Item], dict[str, Array], Array]:
        """What is to be inferred on, the model's inputs for all of it, and which of it has a NaN in it."""
        items: list[Item] = []
        inputs: dict[str, Array] = {}
        specs, gatherer = loaded.signature.inputs, loaded.gatherer
        try:
            if (same := gatherer.alike(messages)) is not None:
                inputs[specs[0].name], bad = gatherer.fit(same[1], specs[0], later=True)
                return same[0], inputs, bad
        except UnfitError:
            pass  # said of each, below
        for message in messages:
            try:
                items.extend(gatherer.items(message))
            except UnfitError as error:
                emit.reject(message, error.reason, error.detail)
        bad = np.zeros(len(items), np.bool_)
        if items:
            for spec in specs:
                inputs[spec.name], holes = gatherer.stacked(items, spec)
                bad |= holes
        return items, inputs, bad

    def _refuse(self, items: list[Item], bad: Array, emit: Emit, reason: str, detail: str) -> Array:
        """Dead-letter the bad ones; the places of the others."""
        for i in np.flatnonzero(bad).tolist():
            emit.reject(items[i].alone(), reason, detail)
        return np.flatnonzero(~bad)

    def _chunk(self, loaded: Loaded, items: list[Item], inputs: dict[str, Array], emit: Emit) -> None:
        n = len(items)
        outputs = loaded.infer(inputs, n)
        done = time.time_ns()
        bad = np.zeros(n, np.bool_)
        for value in outputs.values():
            bad |= missing(value)
        if bad.any():
            good = self._refuse(items, bad, emit, "nan-output", f"the model {loaded.model.name} answers NaN")
            if not len(good):
                return
            items = [items[i] for i in good.tolist()]
            outputs = {name: value[good] for name, value in outputs.items()}
        passes = loaded.decoder.passes
        answers = loaded.decoder.decode(outputs, [item.size for item in items])
        for item, answer in zip(items, answers, strict=True):
            body = _tensors(loaded.model, item, answer) if passes else _prediction(loaded.model, item, answer, done)
            emit.send(_derived(item, body))

    def inputs(self, messages: list[Message], emit: Emit) -> dict[str, Array]:
        """What the model would be given for those messages, [n, …] each, scaled: to calibrate or compare with.

        What it cannot take is rejected to ``emit``.
        """
        with self._using() as loaded:
            _, inputs, bad = self._gather(loaded, messages, emit)
            scaling = self._plan.scaling
            return {
                spec.name: given(inputs[spec.name][~bad], spec, scaling)
                for spec in loaded.signature.inputs
                if spec.name in inputs
            }

    def answers(self, inputs: dict[str, Array], n: int) -> dict[str, Array]:
        """The real numbers that the model answers to so many items, as :meth:`inputs` has them; at most :attr:`max_batch`."""
        with self._using() as loaded:
            return loaded.numbers(inputs, n)

    def close(self) -> None:
        """Free the model."""
        self._loaded.close()


def named(plan: Plan, path: Path) -> Model:
    """Which model a file is, by the plan's names and its digest; where a job has none yet, "untrained", without a digest.

    :raises ConfigError: it cannot be read.
    """
    if plan.later and not path.exists():
        return Model(name=plan.name, version="untrained", digest="")
    try:
        sums = [_digest(part) for part in plan.parts(path)]
    except OSError as error:
        raise ConfigError(f"cannot read the model {error.filename}: {error.strerror}") from None
    digest = sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()
    return Model(name=plan.name, version=plan.version or digest[:8], digest=digest)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _tensors(model: Model, item: Item, answer: Answer) -> Tensors:
    """What another model goes on with; which one it comes from is told, as its prediction will tell only its own."""
    return Tensors(tensors=answer.values or {}, attributes={**item.attributes, "head": f"{model.name} {model.version}"})


def _prediction(model: Model, item: Item, answer: Answer, done: int) -> Predictions:
    message = item.message
    return Predictions(
        model=model,
        seen=message.id,
        labels=answer.labels,
        scores=answer.scores,
        boxes=answer.boxes,
        values=answer.values,
        times={"ingest": message.born, "infer": done} if message.born else {"infer": done},
        attributes=item.attributes,
    )


def _derived(item: Item, body: Body) -> Message:
    """The answer's message: of the message seen, or of one of its rows."""
    message = item.message
    seen = message.body
    if item.row is None or not isinstance(seen, Readings):
        return message.derive(body)
    at = None if seen.time is None else int(seen.time[item.row])
    derived = message.derive(body, part=None if seen.n == 1 else item.row, time=at)
    return derived if seen.source is None else msgspec.structs.replace(derived, source=seen.source[item.row])
