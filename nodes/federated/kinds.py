"""What a job is made of, by name: trainers, strategies and compressors, as their files build them."""

from __future__ import annotations

from typing import Any, cast

from nodes import kinds
from nodes.choice import Chosen
from nodes.compressors._compressor import Compressor
from nodes.operator import Context
from nodes.strategies._strategy import Strategy
from nodes.trainers._trainer import Trainer
from schemas.errors import ConfigError


def trainer(chosen: Chosen, context: Context) -> Trainer:
    """The trainer, opened.

    :raises MissingError: a library is not installed.
    :raises ConfigError: its model does not fit.
    """
    made = cast("Trainer", kinds.module("trainer", chosen.name).build(chosen.options, context))
    made.open()
    return made


def strategy(chosen: Chosen) -> Strategy:
    """The strategy."""
    return cast("Strategy", kinds.module("strategy", chosen.name).build(chosen.options))


def compressor(named: Any) -> Compressor | None:
    """The compressor that a call names, ``{name: options}``; None of None.

    :raises ConfigError: this version has none of that name, or not with such options.
    """
    if named is None:
        return None
    if not (isinstance(named, dict) and len(named) == 1):
        raise ConfigError("expected a compressor's name with its options")
    name, options = next(iter(named.items()))
    module = kinds.module("compressor", str(name))
    try:
        config = module.Config.model_validate(options)
    except ValueError as error:
        raise ConfigError(f"compressor {name}: {error}") from None
    return cast("Compressor", module.build(config))
