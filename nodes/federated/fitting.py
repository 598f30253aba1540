"""How a model is trained, and on what it is measured: options that several kinds of nodes have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from nodes.operator import Context
from schemas.errors import ConfigError, Problem
from schemas.expressions import Number
from schemas.units import Duration

if TYPE_CHECKING:
    from nodes.federated.rounds import Evaluate
    from nodes.federated.rules import Rules
    from nodes.trainers._trainer import Examples, Trainer


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Fitting(_Options):
    """How each client trains in a round."""

    epochs: int = Field(1, ge=0, le=10_000, description="times through its examples")
    batch: int = Field(32, ge=1, description="examples of one step")
    rate: float = Field(0.1, gt=0, description="learning rate")
    momentum: float = Field(0.0, ge=0, lt=1, description="of stochastic gradient descent")


class Pace(_Options):
    """When a job without clients learns."""

    every: Duration = Field(600 * 10**9, gt=0, description="learns again after so long, if anything new has come")
    fresh: int | None = Field(None, ge=1, description="learns at once when so many new examples are there")


class HeldOut(_Options):
    """Examples that no client has, to evaluate each model on."""

    path: str = Field(description="an .npz file")
    x: str = Field("images", description="its array of inputs, the first axis counting them")
    y: str = Field("labels", description="its array of labels: numbers of classes, or numbers to be told")
    scale: Number = Field(1.0, description="every value is multiplied by this; may be written 1/255")


def _bare_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Evaluated: TypeAlias = Annotated[
    HeldOut | None, BeforeValidator(_bare_path, json_schema_input_type=HeldOut | str | None)
]
"""A path, or a map."""


class Alone(Pace):
    """A job without ``federate`` and without other clients: a node that learns by itself, continually."""

    rounds: int | None = Field(
        None, ge=1, description="trainings that are to succeed, then it is over; no end if left out"
    )
    fit: Fitting = Field(Fitting.model_validate({}), description="how each training goes")
    seed: int = Field(0, ge=0, lt=2**31, description="of the order in which it sees its examples")
    evaluate: Evaluated = Field(
        None, description="examples to evaluate each model on; a path, or a map; what 'held' sets aside, if left out"
    )
    watch: str = Field("accuracy", description="the metric that 'tolerance' looks at")
    tolerance: float | None = Field(
        None, ge=0, description="a new model is thrown away if 'watch' is worse than the best by more than this"
    )

    def rules(self, job: str) -> Rules:
        """As the machine takes them."""
        from nodes.federated import rules

        rounds = rules.FOREVER if self.rounds is None else self.rounds
        fit = self.fit.model_dump()
        return rules.Rules(job, rounds, fit=fit, seed=self.seed, watch=self.watch, tolerance=self.tolerance)


def check_held_out(held: HeldOut | None, context: Context, *where: str) -> None:
    """:raises ConfigError: the file is not there."""
    if held is not None and not context.path(held.path).is_file():
        raise ConfigError(Problem((*where, "path"), f"there is no file {context.path(held.path)}"))


def evaluation(held: HeldOut, trainer: Trainer, context: Context) -> Evaluate:
    """Evaluates a model on examples of a file."""
    examples = read_examples(held, context)
    trainer.evaluate(examples)  # the first model, to find out now whether it takes them

    def evaluate(weights: Any) -> dict[str, float]:
        trainer.load(weights)
        return trainer.evaluate(examples)

    return evaluate


def read_examples(held: HeldOut, context: Context) -> Examples:
    """:raises ConfigError: the file cannot be read, or has not these arrays."""
    import numpy as np

    from nodes.trainers._trainer import Examples

    path = context.path(held.path)
    try:
        with np.load(path, allow_pickle=False) as loaded:
            missing = [name for name in (held.x, held.y) if name not in loaded.files]
            if missing:
                raise ConfigError(f"{path.name} has no array {missing[0]!r}, but {', '.join(loaded.files)}")
            x, y = loaded[held.x].astype(np.float32), loaded[held.y]
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if len(x) != len(y) or not len(x):
        raise ConfigError(f"{path.name} has {len(x)} inputs and {len(y)} labels")
    return Examples(x * np.float32(held.scale), y.astype(np.float32 if y.dtype.kind == "f" else np.int64))
