"""One version of a model, loaded and tried: copies of it, what they take and give, and how their answers are read.

``infer`` holds one; where a newer comes (:meth:`nodes.inference.Infer.exchange`) the next is made beside it, and every call is
answered by the one that it began with, whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from nodes.backends._backend import Backend, Scaling, dequantise
from nodes.decoders._decoder import Decoder
from nodes.features import Gatherer
from nodes.models import golden
from schemas.errors import ConfigError
from schemas.messages import Array, Model

_TRIALS = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What every version of a node's model has in common; the names are those of :class:`nodes.infer.Config`.

    :param version: ``""``: the first eight hex digits of the file's digest.
    :param backends: for a model's file, copies of the model that are not open yet; as many calls may be under way.
    :param decoder: makes one, for each version its own: it learns of the model's outputs.
    :param wait: seconds to wait for a batch to fill.
    :param parts: the files that a model is made of, its own first: their sha256 names it, or the sha256 of those in hex.
    :param golden: inputs and what the model of ``path`` is to answer to them, :mod:`nodes.models.golden`.
    :param later: the model's file may come later; the backends know what to do without it.
    """

    path: Path
    name: str
    version: str
    backends: Callable[[Path], Sequence[Backend]]
    decoder: Callable[[], Decoder]
    fields: Sequence[str]
    keep: Sequence[str]
    batch: int
    wait: float
    scaling: Scaling | None = None
    later: bool = False
    golden: Path | None = None
    parts: Callable[[Path], Sequence[Path]] = lambda path: (path,)


class Loaded:
    """Made in any thread; then :meth:`infer` may be called by as many threads as there are copies.

    :param path: of the model's file.
    :raises MissingError: the runtime is not installed.
    :raises ConfigError: the model or the labels do not fit; the runtime refuses the file, or answers its trial with what is no
        number at all, or other than its golden vector has it.
    """

    def __init__(self, plan: Plan, path: Path, model: Model) -> None:
        self.model = model
        self.decoder = plan.decoder()
        self._scaling = plan.scaling
        self._backends = plan.backends(path)
        self.copies = len(self._backends)
        self.invoke_times: dict[int, float] = {}
        """Seconds of one invoke by batch size."""
        self._free: SimpleQueue[Backend] = SimpleQueue()
        signatures = [backend.open() for backend in self._backends]
        self.signature = signatures[0]
        self.decoder.check(self.signature.outputs)
        if plan.scaling is not None and not any(spec.real for spec in self.signature.inputs):
            raise ConfigError(
                f"'scale' is for models that take real numbers; this one takes {self.signature.inputs[0]}"
            )
        self.gatherer = Gatherer(self.signature, plan.fields, plan.keep, plan.scaling)
        self.sizes = sizes(plan.batch) if self.signature.batch is None else [self.signature.batch]
        self._warm_up()
        if plan.golden is not None and path == plan.path:
            golden.compare(plan.golden, self.numbers, self.sizes[-1])

    def _warm_up(self) -> None:
        """Try it on zeros and noise at every batch size, and measure."""
        trials = []
        first, *others = self._backends
        for n in self.sizes:
            inputs = self._trial(n)
            trials.append(self.real(first.infer(inputs)))
            spent = []
            for _ in range(_TRIALS):
                start = time.perf_counter()
                first.infer(inputs)
                spent.append(time.perf_counter() - start)
            self.invoke_times[n] = sorted(spent)[_TRIALS // 2]
            for other in others:
                other.infer(inputs)
        outputs = {name: np.concatenate([trial[name] for trial in trials]) for name in trials[0]}
        self.decoder.tune(outputs)
        for backend in self._backends:
            self._free.put(backend)

    def _trial(self, n: int) -> dict[str, Array]:
        noise = np.random.default_rng(0)
        inputs: dict[str, Array] = {}
        for spec in self.signature.inputs:
            value = np.zeros((n, *spec.shape), spec.dtype)
            if n == self.sizes[-1]:
                # Real numbers only: noise among, say, token numbers may point outside a table.
                if spec.dtype.kind == "f":
                    value[...] = noise.random(value.shape)
                elif spec.quantisation is not None:
                    limits = np.iinfo(np.dtype(spec.dtype.str))
                    value[...] = noise.integers(limits.min, limits.max, value.shape, endpoint=True)
            inputs[spec.name] = value
        return inputs

    def infer(self, inputs: dict[str, Array], n: int) -> dict[str, Array]:
        """The answers to n items, as the decoder wants them."""
        size = next(s for s in self.sizes if s >= n)
        if size > n:
            inputs = {
                name: np.concatenate((value, np.zeros((size - n, *value.shape[1:]), value.dtype)))
                for name, value in inputs.items()
            }
        backend = self._free.get()
        try:
            given = backend.infer(inputs, self._scaling)
        finally:
            self._free.put(backend)
        return self.real({name: value[:n] for name, value in given.items()})

    def numbers(self, inputs: dict[str, Array], n: int) -> dict[str, Array]:
        """The answers to n items as real numbers, whatever the decoder wants."""
        outputs = self.infer(inputs, n)
        if not self.decoder.stored:
            return outputs
        return {spec.name: dequantise(outputs[spec.name], spec) for spec in self.signature.outputs}

    def real(self, outputs: dict[str, Array]) -> dict[str, Array]:
        """The outputs as the decoder wants them."""
        if self.decoder.stored:
            return outputs
        return {spec.name: dequantise(outputs[spec.name], spec) for spec in self.signature.outputs}

    def close(self) -> None:
        """Free the model. Nobody calls :meth:`infer` now or later."""
        for backend in self._backends:
            backend.close()


def sizes(most: int) -> list[int]:
    """Batch sizes that are run: powers of two below ``most``, and ``most``; a batch is padded up to the next."""
    return [*(1 << i for i in range((most - 1).bit_length())), most]
