"""What both sides of a job are told: the keys that ``train`` and ``federate``, ``answer`` and ``ask`` share."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from nodes.choice import Chosen, choice
from nodes.federated.key_options import COORDINATOR, KEY, Key
from nodes.operator import Context
from nodes.options import Options
from schemas import topics
from schemas.errors import ConfigError, Problem, did_you_mean

if TYPE_CHECKING:
    from nodes.federated.line import Connect

    Trained = Chosen
else:
    Trained = choice("trainer")


C = TypeVar("C", bound="MemberOptions")


class MemberOptions(Options):
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
        known(self.broker, context, "broker")

    def carried(self, kind: type[C], **more: Any) -> C:
        """Options of another kind that does our work: ours where it has the same, ``more``, and its defaults."""
        names = type(self).model_fields.keys() & kind.model_fields.keys()
        return kind.model_construct(**{name: getattr(self, name) for name in names}, **more)

    def root(self, context: Context) -> str:
        """What the job's topics begin with."""
        return f"{context.topology}/fed/{self.job}"

    def connect(self, context: Context, name: str) -> Connect:
        """Gives a party its bus."""
        return connecting(context, self.broker, name)


class Of(BaseModel):
    """The job above: this one's leader is one client of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: str = Field(description="name of the job above")
    broker: str | None = Field(
        None, description="name of a broker of the topology, or its URL, where it is; the host's own if left out"
    )
    client: str | None = Field(None, description="name in it, of this node and no other; the node's name if left out")
    topology: str | None = Field(
        None, description="name of the topology that it is in, where that is another one; this one's if left out"
    )

    coordinator: str | None = Field(None, min_length=1, description=COORDINATOR)

    @field_validator("job", "client", "topology")
    @classmethod
    def _levels(cls, name: str | None) -> str | None:
        return None if name is None else level(name)

    def root(self, context: Context) -> str:
        """What the topics of the job above begin with."""
        return topics.federated(self.topology or context.topology, self.job)

    def name(self, context: Context) -> str:
        """In the job above."""
        return self.client or context.node

    def connect(self, context: Context) -> Connect:
        """Gives the half above its bus. Sites with nodes of one name may have it at one broker, so its client has another."""
        return connecting(context, self.broker, f"above-{self.name(context)}")


def connecting(context: Context, broker: str | None, name: str) -> Connect:
    """Gives a party a bus: patient for ever, with a session that outlives a lost link but not the process."""
    from nodes.federated.line import RECEIVE, SESSION

    options: dict[str, Any] = {
        "receive_maximum": RECEIVE,
        "session_expiry": SESSION,
        "clean_start": True,
        "prompt": True,
    }
    return partial(context.bus, broker, name, patience=math.inf, **options)


def known(broker: str | None, context: Context, *where: str) -> None:
    """Look whether the topology has that broker, where it is named.

    :raises ConfigError: it has not.
    """
    if broker is not None and "://" not in broker and broker not in context.brokers:
        raise ConfigError(Problem(where, f"unknown broker {broker!r}{did_you_mean(broker, context.brokers)}"))


class JobOptions(MemberOptions):
    """A job and its model."""

    trainer: Trained = Field(description="what learns, one of the trainers with its options; equal on both sides")

    def check(self, context: Context) -> None:
        super().check(context)
        with self.trainer.at("trainer"):
            self.trainer.options.check(context)


def level(name: str) -> str:
    """The name as it is, if it may stand as one level of a topic.

    :raises ValueError: it may not.
    """
    if not topics.is_level(name):
        raise ValueError("expected a name of a-z, 0-9, _ and -")
    return name
