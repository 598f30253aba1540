"""Give examples of this gateway to the pool of a job: sealed, so that only its trainer reads them, and only with consent.

``{pool: {job: digits, consent: given, key: gateway.key, coordinator: lead.pub, part: 0.05}}``: of the labelled messages that come
in, a part goes to the job's ``federate`` node that has a ``pool``. It waits on this node's disk, within a budget, until that has
it. With ``consent: withdrawn`` nothing goes out but that word, and what was given is forgotten there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from nodes import log
from nodes.federated import key_options
from nodes.federated.label_options import LabelOptions
from nodes.federated.options import MemberOptions, level
from nodes.operator import Context, Sink
from schemas.errors import ConfigError, Problem, RejectedError
from schemas.messages import Message
from schemas.units import Duration, Size

if TYPE_CHECKING:
    from nodes.federated.examples import Example
    from nodes.federated.giver import Giver
    from nodes.federated.outbox import Outbox
    from nodes.federated.party import Party

SECOND = 10**9
OUTCOMES = {
    "given": "all is given",
    "withdrawn": "consent is withdrawn, and what was given is forgotten",
    "closed": "the job is over; what waits was not taken",
}


class Config(LabelOptions, MemberOptions):
    """Options of ``pool``."""

    consent: Literal["given", "withdrawn"] = Field(
        description="given: examples leave this gateway; withdrawn: none does, and the trainer forgets those that did"
    )
    client: str | None = Field(None, description="name in the job, and of its key there. The node's name if left out")
    coordinator: str | None = Field(None, min_length=1, description=key_options.COORDINATOR)
    plain: bool = Field(False, description="without keys: whoever reads the broker reads the examples")
    part: float = Field(1.0, gt=0, le=1, description="of the examples that are given, drawn by their identity")
    each: int | None = Field(
        None, ge=1, description="examples of each class that are given, in all; of numbers, all; no limit if left out"
    )
    size: Size = Field(16 * 10**6, ge=1024, description="bytes that may wait; what comes while so many do is not given")
    batch: Size = Field(256 * 1024, ge=1024, le=4 * 2**20, description="bytes of examples that are sent at once")
    linger: Duration = Field(10 * SECOND, description="what fewer bytes wait for more")

    @field_validator("client")
    @classmethod
    def _named(cls, name: str | None) -> str | None:
        return None if name is None else level(name)

    def check(self, context: Context) -> None:
        super().check(context)
        key_options.check(context, self.key, self.coordinator)
        if self.plain and (self.key is not None or self.coordinator is not None):
            raise ConfigError(Problem(("plain",), "there are keys: leave 'plain' out"))
        if not self.plain and (self.key is None or self.coordinator is None):
            why = "needs 'key' and 'coordinator', to seal what leaves; or 'plain: true', and everybody at the broker reads it"
            raise ConfigError(Problem((), why))
        self.check_labels(context)

    def whole(self) -> str:
        return "each would be a gateway of the same name"


def build(config: Config, context: Context) -> Sink:
    """A :class:`PoolSink`."""
    return PoolSink(config, context)


class PoolSink(Sink):
    """Keeps what is to be given, and carries the giver beside."""

    max_batch = 256
    linger = 0.05

    def __init__(self, config: Config, context: Context) -> None:
        self._config = config
        self._context = context
        self._outbox: Outbox | None = None
        self._giver: Giver | None = None
        self._party: Party | None = None
        self._full = 0
        self._over = asyncio.Event()

    async def open(self) -> None:
        """:raises BusError: the broker refuses us.
        :raises MissingError: there are keys, and the library that computes with them is not installed.
        """
        from nodes.federated.giver import Giver
        from nodes.federated.outbox import Outbox
        from nodes.federated.party import Party
        from nodes.federated.store import Store

        config, context = self._config, self._context
        trust = key_options.client_trust(config.key, config.coordinator, context)
        self._labelled = config.reading(context)
        box = self._outbox = Outbox(
            context.state / "given.sqlite",
            size=config.size,
            part=config.part,
            each=config.each,
            numbers=config.target == "number",
        )
        gives = config.consent == "given"
        if gives:
            box.consent(time.time_ns())
        else:
            box.withdraw(time.time_ns())
        self._giver = Giver(
            config.job,
            config.client or context.node,
            box,
            signer=trust.signer,
            trainer=trust.coordinator,
            plain=config.plain,
            gives=gives,
            batch=config.batch,
            linger=config.linger / SECOND,
        )
        self._party = Party(
            self._giver,
            Store(context.state / f"{config.job}.sqlite"),
            config.connect(context, "pool"),
            config.root(context),
            node=context.node,
            job=config.job,
        )
        await self._party.open()

    async def beside(self) -> None:
        """The gateway's part of the pool."""
        if self._party is not None and self._giver is not None:
            await self._party.run()
            log.info(OUTCOMES[self._giver.outcome], node=self._context.node, job=self._config.job)
            self._over.set()

    async def finish(self) -> None:
        if self._party is not None and self._giver is not None:
            self._party.tell(self._giver.ended)
        await self._over.wait()

    async def close(self) -> None:
        if self._party is not None:
            await self._party.close()
        if self._outbox is not None:
            self._outbox.close()

    async def write(self, messages: Sequence[Message]) -> None:
        box = self._outbox
        if box is None or self._party is None or self._giver is None:
            raise RuntimeError("the sink is not open")
        if not box.life:
            return  # no consent: nothing is even looked at
        examples: list[Example] = []
        rejected: list[tuple[int, str]] = []
        for i, message in enumerate(messages):
            try:
                examples += self._labelled.read(message)
            except ValueError as error:
                rejected.append((i, str(error)))
        await asyncio.to_thread(box.add, examples)
        if box.full > self._full == 0:
            log.warning("not all is given: so much waits already", node=self._context.node, bytes=box.bytes)
        self._full = box.full
        self._party.tell(self._giver.fed)
        if rejected:
            raise RejectedError(rejected)
