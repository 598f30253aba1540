"""What both sides of a job are told: the keys that ``train`` and ``federate`` share."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from nodes.choice import Chosen, choice
from nodes.federated.key_options import KEY, Key
from nodes.operator import Context
from nodes.options import Options
from schemas import topics
from schemas.errors import ConfigError, Problem, did_you_mean

if TYPE_CHECKING:
    from nodes.federated.party import Connect

    Trained = Chosen
else:
    Trained = choice("trainer")


class MeetingOptions(Options):
    """A job, and the broker where it is."""

    job: str = Field(description="name of the job, the same on both sides")
    broker: str | None = Field(
        None, description="name of a broker of the topology, or its URL, where the job is; the host's own if left out"
    )
    key: Key = Field(None, description=KEY)

    @field_validator("job")
    @classmethod
    def _level(cls, name: str) -> str:
        return level(name)

    def check(self, context: Context) -> None:
        if self.broker is not None and "://" not in self.broker and self.broker not in context.brokers:
            hint = did_you_mean(self.broker, context.brokers)
            raise ConfigError(Problem(("broker",), f"unknown broker {self.broker!r}{hint}"))

    def root(self, context: Context) -> str:
        """What the job's topics begin with."""
        return f"{context.topology}/fed/{self.job}"

    def connect(self, context: Context, name: str) -> Connect:
        """Gives a party its bus: patient for ever, with a session that outlives a lost link but not the process."""
        from nodes.federated.party import RECEIVE, SESSION

        options: dict[str, Any] = {
            "receive_maximum": RECEIVE,
            "session_expiry": SESSION,
            "clean_start": True,
            "prompt": True,
        }
        return partial(context.bus, self.broker, name, patience=math.inf, **options)


class JobOptions(MeetingOptions):
    """A job and its model."""

    trainer: Trained = Field(description="what learns, one of the trainers with its options; equal on both sides")

    def check(self, context: Context) -> None:
        with self.trainer.at("trainer"):
            self.trainer.options.check(context)
        super().check(context)


def level(name: str) -> str:
    """The name as it is, if it may stand as one level of a topic.

    :raises ValueError: it may not.
    """
    if not topics.is_level(name):
        raise ValueError("expected a name of a-z, 0-9, _ and -")
    return name
