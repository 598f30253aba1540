"""A PyTorch module of the user's own: ``{torch: {path: my_model.py, function: network}}``, or ``call: package.module:name``.

The function (or class) is called with ``options`` and gives a ``torch.nn.Module`` whose output is logits [n, classes], or a
regression's numbers. Stochastic gradient descent by ``torch.optim.SGD``. What is exchanged is the module's ``state_dict`` as
far as it is of real numbers: parameters, and statistics (of batch normalisation), which no proximal term or correction touches.

Install PyTorch itself, in the build that suits the machine: ``pip install torch``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

import numpy as np
from pydantic import Field

from nodes.federated.weights import Shape, Weights, fit, shapes
from nodes.operator import Context
from nodes.trainers import _data
from nodes.trainers._trainer import Examples, Fit, Fitted, Trainer
from nodes.usercode.load import explain, load_file, load_module, pick, where
from nodes.usercode.options import CodeOptions
from schemas.errors import ConfigError, MissingError, PenstockError, Problem, RunError
from schemas.messages import Array


class Config(CodeOptions):
    """The module."""

    loss: Literal["cross-entropy", "mse"] = Field(
        "cross-entropy",
        description="cross-entropy: a classifier that gives logits; mse: a regression, mean squared error.",
    )
    shape: list[int] | None = Field(
        None,
        description="Shape of one example, which is given to the module so: [1, 8, 8]. Left out: as it comes; then infer cannot "
        "serve the module.",
        min_length=1,
    )
    seed: int = Field(0, description="Of the initial weights; both sides of a job must have the same.", ge=0)
    threads: int = Field(
        1, description="Threads of PyTorch in this process; with more, sums may differ in the last digit.", ge=1
    )

    def check(self, context: Context) -> None:
        """The file is there; it is not run."""
        self.where(context)


def build(config: Config, context: Context) -> Trainer:
    """The trainer."""
    return Torch(config, context)


class Torch(Trainer):
    """The module on the CPU; see above."""

    def __init__(self, config: Config, context: Context) -> None:
        self._config = config
        self._context = context
        self._file, self._name = config.where(context)
        self._torch: Any = None
        self._module: Any = None
        self._optimiser: Any = None
        self.shapes: tuple[Shape, ...] = ()

    def open(self) -> None:
        """Import PyTorch, make the module.

        :raises ConfigError: the user's code fails, or gives no module.
        """
        try:
            torch = import_module("torch")
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise MissingError("PyTorch (torch), see https://pytorch.org,") from error
        self._torch = torch
        torch.set_num_threads(self._config.threads)
        if self._config.path is not None:
            key, module = "function", load_file(self._file, f"penstock_trainer_{self._file.stem}")
        else:
            key, module = "call", load_module((self._config.call or "").partition(":")[0], self._file)
        make: Callable[..., Any] = pick(module, self._name, key, self._file)
        with self._seeded(self._config.seed):
            try:
                made = make(**self._config.options)
            except Exception as error:
                raise ConfigError(Problem((key,), f"{where(error, self._file)}: {explain(error)}")) from error
        if not isinstance(made, torch.nn.Module):
            raise ConfigError(Problem((key,), f"{self._name} gave a {type(made).__name__}, no torch.nn.Module"))
        self._module = made
        self._optimiser = None
        self.shapes = shapes(self.weights())
        if not self.shapes:
            raise ConfigError(Problem((key,), f"the module that {self._name} gave has no weights"))

    @contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        """Drawing (initial weights, dropout) from ``seed``; what others in this process draw goes on as it was."""
        with self._torch.random.fork_rng(devices=[]):
            self._torch.manual_seed(seed % 2**63)
            yield

    def _state(self) -> dict[str, Any]:
        return {name: value for name, value in self._module.state_dict().items() if value.is_floating_point()}

    def weights(self) -> Weights:
        """A copy of the ``state_dict``'s real numbers."""
        return {name: np.array(value.detach().cpu().numpy(), order="C") for name, value in self._state().items()}

    def load(self, weights: Weights) -> None:
        """Continue from these."""
        fit(weights, self.shapes)
        with self._torch.no_grad():
            for name, value in self._state().items():
                value.copy_(self._torch.from_numpy(np.array(weights[name])))
        self._optimiser = None

    def fit(self, examples: Examples, plan: Fit) -> Fitted:
        """Train in place.

        :raises RunError: the module fails on the examples; says where.
        """
        torch = self._torch
        correction = _data.checked(plan, self.shapes)
        _data.alike(examples)
        x = torch.from_numpy(self._shaped(examples.x))
        y = torch.from_numpy(self._labels(examples.y))
        named = dict(self._module.named_parameters())
        start = {name: value.detach().clone() for name, value in named.items()} if plan.proximal else {}
        added = {name: torch.from_numpy(np.array(correction[name])) for name in named if name in correction}
        self._prepare(plan, named)
        self._module.train()
        steps, losses = 0, list[float]()
        with self._seeded(plan.seed), self._blaming():
            for epoch, order in enumerate(_data.orders(plan, len(examples)), 1):
                rows = torch.from_numpy(order)
                for part, right in zip(x[rows].split(plan.batch), y[rows].split(plan.batch), strict=True):
                    self._optimiser.zero_grad()
                    loss = self._measure(self._module(part), right)
                    loss.backward()
                    if start or added:
                        self._add(named, plan.proximal, start, added)
                    self._optimiser.step()
                    steps += 1
                    if epoch == plan.epochs:
                        losses.append(float(loss.detach()))
        return Fitted(steps, float(np.mean(losses)) if losses else float("nan"))

    def _add(self, named: dict[str, Any], proximal: float, start: dict[str, Any], added: dict[str, Any]) -> None:
        """The proximal term and the correction, to the gradients."""
        with self._torch.no_grad():
            for name, value in named.items():
                if value.grad is None:
                    continue
                if start:
                    value.grad.add_(value - start[name], alpha=proximal)
                if name in added:
                    value.grad.add_(added[name])

    def _prepare(self, plan: Fit, named: dict[str, Any]) -> None:
        if self._optimiser is None or not plan.momentum:
            self._optimiser = self._torch.optim.SGD(named.values(), lr=plan.rate, momentum=plan.momentum)
        for group in self._optimiser.param_groups:
            group.update(lr=plan.rate, momentum=plan.momentum)

    def _shaped(self, x: Array) -> Array:
        if self._config.shape is None:
            return np.ascontiguousarray(x, np.float32)
        return _data.table(x, math.prod(self._config.shape)).reshape(len(x), *self._config.shape)

    def _labels(self, y: Array) -> Array:
        if self._config.loss == "mse":
            if y.dtype.kind != "f":
                raise ConfigError(f"targets of {y.dtype.name}; a regression learns from real numbers")
            return np.ascontiguousarray(y, np.float32)
        if y.ndim == 2:
            return _data.wanted(y, y.shape[1])
        return _data.classes(y, 2**31)  # how many classes there are, only the module knows

    def _measure(self, answers: Any, y: Any) -> Any:
        functions = self._torch.nn.functional
        if self._config.loss == "mse":
            return functions.mse_loss(answers, y.reshape(answers.shape))
        return functions.cross_entropy(answers, y)

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        try:
            yield
        except PenstockError:
            raise
        except Exception as error:
            raise RunError(f"{where(error, self._file)}: {explain(error)}") from error

    def takes(self) -> tuple[int, ...] | None:
        """What the option ``shape`` says."""
        return None if self._config.shape is None else tuple(self._config.shape)

    def predict(self, x: Array) -> Array:
        """The module's output; through softmax, of a classifier."""
        torch = self._torch
        self._module.eval()
        with torch.no_grad(), self._blaming():
            parts = torch.from_numpy(self._shaped(x)).split(1024)
            answers = torch.cat([self._module(part) for part in parts])
            if self._config.loss == "cross-entropy":
                answers = torch.softmax(answers, dim=1)
        return np.asarray(answers.reshape(len(x), -1).numpy(), np.float32)

    def close(self) -> None:
        """Let the module go."""
        self._module = self._optimiser = None
