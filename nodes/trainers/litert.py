"""A .tflite model with training signatures, on the device by LiteRT: ``{litert: {model: digits-train.tflite}}``.

The model has the signatures of TensorFlow's guide to training on a device: ``train`` (``x``, ``y``, and ``rate``; gives
``loss``), ``infer`` (``x``; one output: probabilities, or a regression's numbers), ``get_weights``, ``set_weights``. Or it keeps
nothing: then ``train`` and ``infer`` take the weights too, ``train`` gives the new ones under the same names, ``get_weights`` has
those to begin with, and there is no ``set_weights``.

``train`` is one step of plain gradient descent; momentum, the proximal term and the correction are added to it from outside, by
the same formulas as in the trainer ``mlp``, which costs a look at the weights for each step. A model whose ``train`` takes no
``rate`` has an optimiser of its own: the plan's rate is not looked at, and these three are refused.

Its batch is a fixed number of rows: the plan must name it, the rest of an epoch is left out, and where there are fewer rows than
one batch, rows are taken twice. docs/federated-trainers.md shows how such a model is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from nodes.federated.weights import Shape, Weights, fit, shapes
from nodes.operator import Context
from nodes.options import Options
from nodes.trainers import _data
from nodes.trainers._trainer import Examples, Fit, Fitted, Trainer
from schemas.errors import ConfigError, Problem, RunError
from schemas.messages import Array

EXTRA = "litert"


class Config(Options):
    """The model."""

    model: str = Field(description="Path of the .tflite file.", min_length=1)
    threads: int = Field(1, description="Threads of one call.", ge=1, le=256)

    def check(self, context: Context) -> None:
        """The file is there."""
        if not (path := context.path(self.model)).is_file():
            raise ConfigError(Problem(("model",), f"no such file: {path}"))


def build(config: Config, context: Context) -> Trainer:
    """The trainer."""
    return LiteRT(context.path(config.model), config.threads)


class LiteRT(Trainer):
    """The model in one interpreter; see the module."""

    def __init__(self, model: Path, threads: int = 1) -> None:
        self._model = model
        self._threads = threads
        self._interpreter: Any = None
        self._runners: dict[str, Any] = {}
        self._kept: Weights | None = None  # of a model that keeps nothing
        self._pushed: Weights | None = None  # momentum: what the last step added
        self.shapes: tuple[Shape, ...] = ()
        self.batch = 0
        self._rated = self._classifies = True
        self._answers = self._loss = ""
        self._x: tuple[int, ...] = ()
        self._y: np.dtype[Any]

    def open(self) -> None:
        """Load the file and look at its signatures.

        :raises ConfigError: they are not those of a model that learns.
        """
        from nodes.backends.litert import find_runtime

        runtime = find_runtime()
        try:
            self._interpreter = runtime.Interpreter(str(self._model), num_threads=self._threads)
            found = self._interpreter.get_signature_list()
            if missing := [name for name in ("train", "infer", "get_weights") if name not in found]:
                there = ", ".join(found) or "none"
                raise ConfigError(
                    f"{self._model.name} does not learn: it has no signature {missing[0]!r}, only {there}"
                )
            self._runners = {name: self._interpreter.get_signature_runner(name) for name in found}
            first = self._runners["get_weights"]()
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"LiteRT refuses {self._model.name}: {_line(error)}") from error
        self.shapes = shapes(first)
        self._look(found)
        self._kept = None if "set_weights" in found else first
        self._pushed = None

    def _look(self, found: dict[str, dict[str, list[str]]]) -> None:
        """Whether the signatures fit each other."""
        names = {shape.name for shape in self.shapes}
        stateless = "set_weights" not in found
        held = names if stateless else set[str]()
        expected: dict[str, tuple[set[str], set[str]]] = {
            "train": ({"x", "y", *held}, held),
            "infer": ({"x", *held}, set()),
            **({} if stateless else {"set_weights": (names, set())}),
        }
        for name, (ins, outs) in expected.items():
            for wanted, side in ((ins, "inputs"), (outs, "outputs")):
                if lacking := sorted(wanted - set(found[name][side])):
                    self._refuse(f"its signature {name!r} lacks {side[:-1]} {lacking[0]!r}")
            optional = {"rate"} if name == "train" else set()
            if more := sorted(set(found[name]["inputs"]) - ins - optional):
                self._refuse(f"its signature {name!r} has an input {more[0]!r} that is none of x, y, rate or a weight")
        answers = [name for name in found["infer"]["outputs"] if name not in names]
        if len(answers) != 1:
            self._refuse(f"its signature 'infer' has {len(answers)} outputs")
        self._answers = answers[0]
        self._rated = "rate" in found["train"]["inputs"]
        self._loss = "loss" if "loss" in found["train"]["outputs"] else ""
        details = self._runners["train"].get_input_details()
        inferring = self._runners["infer"].get_input_details()["x"]["shape"]
        x, y = details["x"], details["y"]
        self.batch, self._x = int(x["shape"][0]), tuple(map(int, x["shape"][1:]))
        self._y = np.dtype(y["dtype"])
        self._classifies = self._y.kind in "iu"
        if tuple(inferring) != tuple(x["shape"]) or int(y["shape"][0]) != self.batch:
            self._refuse("x and y of 'train', and x of 'infer', have different numbers of rows")
        if np.dtype(x["dtype"]) != np.float32:
            self._refuse(f"x is {np.dtype(x['dtype']).name}; expected float32")

    def _refuse(self, what: str) -> None:
        raise ConfigError(f"{self._model.name} cannot be trained: {what}")

    def weights(self) -> Weights:
        """A copy, in the order of the signature."""
        found = self._kept if self._kept is not None else self._call("get_weights", {})
        return {shape.name: found[shape.name].copy() for shape in self.shapes}

    def load(self, weights: Weights) -> None:
        """Continue from these."""
        fit(weights, self.shapes)
        self._pushed = None
        self._set({name: np.array(array) for name, array in weights.items()})

    def _set(self, weights: Weights) -> None:
        if self._kept is None:
            self._call("set_weights", weights)
        else:
            self._kept = weights

    def _call(self, name: str, inputs: dict[str, Any]) -> dict[str, Array]:
        try:
            answer: dict[str, Array] = self._runners[name](**inputs)
        except (ValueError, RuntimeError) as error:
            raise RunError(f"LiteRT failed in {name!r} of {self._model.name}: {_line(error)}") from error
        return answer

    def fit(self, examples: Examples, plan: Fit) -> Fitted:
        """Train in place.

        :raises ConfigError: another batch than the model's; a momentum and the like where the model has its own optimiser.
        """
        correction = _data.checked(plan, self.shapes)
        _data.unable("litert (this model has an optimiser of its own)", plan, **dict.fromkeys(_EXTRAS, self._rated))
        if plan.batch != self.batch:
            raise ConfigError(
                f"fit.batch is {plan.batch}; {self._model.name} takes {self.batch} rows in a step, no other number"
            )
        x, y = self._table(examples)
        n, size = len(x), self.batch
        around = bool(plan.momentum or plan.proximal or correction)
        start = self.weights() if plan.proximal else {}
        if not plan.momentum:
            self._pushed = None
        steps, losses = 0, list[float]()
        for epoch, order in enumerate(_data.orders(plan, n), 1):
            whole = order if n >= size else np.resize(order, size)
            for at in range(0, len(whole) - size + 1, size):
                rows = whole[at : at + size]
                inputs: dict[str, Any] = {"x": x[rows], "y": y[rows], **(self._kept or {})}
                if self._rated:
                    inputs["rate"] = np.float32(plan.rate)
                before = self.weights() if around else {}
                answer = self._call("train", inputs)
                if self._kept is not None:
                    self._kept = {shape.name: answer[shape.name] for shape in self.shapes}
                if around:
                    self._around(before, start, plan)
                steps += 1
                if epoch == plan.epochs and self._loss:
                    losses.append(float(np.mean(answer[self._loss])))
        return Fitted(steps, float(np.mean(losses)) if losses else float("nan"))

    def _around(self, before: Weights, start: Weights, plan: Fit) -> None:
        """What the plan adds to the model's own step, which went from ``before`` to where the weights are now."""
        after = self.weights()
        pushed: Weights = {}
        for name, now in after.items():
            if now.dtype.kind != "f":
                pushed[name] = now - before[name]
                continue
            push = now - before[name]
            if plan.proximal:
                push -= np.float32(plan.rate * plan.proximal) * (before[name] - start[name])
            if plan.correction:
                push -= np.float32(plan.rate) * plan.correction[name]
            if plan.momentum and self._pushed is not None:
                push += np.float32(plan.momentum) * self._pushed[name]
            pushed[name] = push
        if plan.momentum:
            self._pushed = pushed
        self._set({name: before[name] + push for name, push in pushed.items()})

    def _table(self, examples: Examples) -> tuple[Array, Array]:
        _data.alike(examples)
        x = _data.table(examples.x, int(np.prod(self._x, dtype=int))).reshape(len(examples), *self._x)
        if self._classifies:
            # how many classes there are, only the answers tell
            count = int(self._runners["infer"].get_output_details()[self._answers]["shape"][-1])
            return x, _data.classes(examples.y, count).astype(self._y)
        form = tuple(map(int, self._runners["train"].get_input_details()["y"]["shape"][1:]))
        return x, _data.numbers(examples.y, int(np.prod(form, dtype=int))).reshape(len(x), *form).astype(self._y)

    def takes(self) -> tuple[int, ...]:
        """As the signatures say."""
        return self._x

    def predict(self, x: Array) -> Array:
        """The output of ``infer``."""
        table = _data.table(x, int(np.prod(self._x, dtype=int))).reshape(len(x), *self._x)
        out = []
        for at in range(0, max(len(table), 1), self.batch):
            part = table[at : at + self.batch]
            filled = np.zeros((self.batch, *self._x), np.float32)
            filled[: len(part)] = part
            answer = self._call("infer", {"x": filled, **(self._kept or {})})[self._answers]
            out.append(answer.reshape(self.batch, -1)[: len(part)])
        return np.concatenate(out).astype(np.float32, copy=False)

    def close(self) -> None:
        """Let the interpreter go."""
        self._runners, self._interpreter = {}, None


_EXTRAS = ("momentum", "proximal", "correction")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
