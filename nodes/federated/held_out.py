"""Examples that no client has, read from a file, to evaluate each model of a job on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nodes.federated.rounds import Evaluate
from nodes.operator import Context
from nodes.trainers._trainer import Examples, Trainer
from schemas.errors import ConfigError

if TYPE_CHECKING:
    from nodes.federate import HeldOut


def evaluation(held: HeldOut, trainer: Trainer, context: Context) -> Evaluate:
    """Evaluates a model on examples of a file.

    :raises ConfigError: they cannot be read, or do not fit the model.
    """
    examples = read_examples(held, context)
    trainer.evaluate(examples)  # the first model, to find out now whether it takes them

    def evaluate(weights: Any) -> dict[str, float]:
        trainer.load(weights)
        return trainer.evaluate(examples)

    return evaluate


def read_examples(held: HeldOut, context: Context) -> Examples:
    """:raises ConfigError: the file cannot be read, or has not these arrays."""
    import numpy as np

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
