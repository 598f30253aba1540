"""What ``federate`` with ``pool`` does beside leading: takes what gateways give, and has it learned from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nodes import log
from nodes.federated import kinds
from nodes.federated.fitting import Pace
from nodes.federated.options import JobOptions
from nodes.federated.trust import ClientTrust, CoordinatorTrust
from nodes.operator import Context
from schemas.expressions import Number
from schemas.units import Size

if TYPE_CHECKING:
    from nodes.federated.alone import Solo
    from nodes.federated.examples import Example
    from nodes.federated.party import Party
    from nodes.federated.rounds import Evaluate
    from nodes.federated.rules import Rules
    from nodes.trainers._trainer import Trainer

CLIENT = "pool"
"""Name of the client that learns from the pool."""
UPLOADS = 256 * 10**6
"""Bytes that large batches on their way may take on the disk, together."""


class Pooled(BaseModel):
    """A pool: examples that gateways give (``pool``), learned from here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alone: Pace | None = Field(
        None,
        description="no clients are asked: the leader learns from the pool whenever there is enough that is new."
        " If left out, the pool is one more client of the rounds, named pool",
    )
    plain: bool = Field(False, description="takes examples that are not sealed, of anybody")
    scale: Number = Field(1.0, description="every value is multiplied by this; may be written 1/255")
    target: Literal["class", "number"] = Field("class", description="what the labels are; number: a regression")
    keep: int = Field(50_000, ge=1, le=10_000_000, description="most examples that are kept")
    size: Size = Field(256 * 10**6, ge=1024, description="most bytes of examples that are kept")
    policy: Literal["latest", "reservoir", "balanced"] = Field(
        "reservoir", description="which are kept when there are more, as for train"
    )
    least: int = Field(1, ge=1, description="examples that must be there before they are learned from")
    replay: float | None = Field(
        None, ge=0, lt=1, description="learns what is new with this share of what came before, as train does"
    )
    held: float = Field(0.0, ge=0, lt=1, description="share of the examples that is set aside, as for train")

    def wrong(self, config: Any) -> str:
        """What does not go together with the other options of ``federate``; empty: nothing."""
        if self.plain and config.key is not None:
            return "plain: there is a 'key': what gateways give is sealed to it; leave 'plain' out"
        if not self.plain and (config.key is None or config.devices is None):
            return "needs 'key' and 'devices', so that what gateways give can be sealed and its sender known; or plain: true"
        if isinstance(config.devices, Mapping) and CLIENT in config.devices:
            return f"one of the devices is called {CLIENT!r}, as the client is that learns from the pool"
        if self.target == "number" and self.policy == "balanced":
            return "policy: labels that are numbers have no classes to balance"
        if self.alone is not None and config.privacy is not None:
            return "alone: there are no updates of clients, to which 'privacy' could add noise"
        if self.alone is not None and config.buffer is not None:
            return "alone: there are no updates of clients, which 'buffer' could count"
        return ""


class Fits:
    """Looks whether the model takes an example, by asking it once for each form."""

    def __init__(self, trainer: Callable[[], Trainer], scale: float, *, classes: bool) -> None:
        self._trainer, self._scale, self._classes = trainer, scale, classes
        self._forms: dict[tuple[str, tuple[int, ...]], int | None] = {}

    def __call__(self, example: Example) -> None:
        """:raises ValueError: it does not."""
        form = (example.x.dtype.str, example.x.shape)
        if form not in self._forms:
            self._forms[form] = self._ask(example)
        outputs = self._forms[form]
        if self._classes and outputs is not None and example.y >= outputs:
            raise ValueError(f"the class {example.y}; the model knows 0 to {outputs - 1}")

    def _ask(self, example: Example) -> int | None:
        import numpy as np

        trainer = self._trainer()
        try:
            answers = trainer.predict(example.x[None].astype(np.float32) * np.float32(self._scale))
        except Exception as error:  # noqa: BLE001 - any library's own error says that it does not fit
            text = f"the model does not take {example.x.dtype} {list(example.x.shape)}: {error}"
            raise ValueError(text) from None
        finally:
            trainer.close()
        return int(answers.shape[1]) if answers.ndim == 2 else None


class PoolSide:
    """The pool's machine, the examples, and the client that learns from them where there are others."""

    def __init__(self, options: Pooled, config: JobOptions, trust: CoordinatorTrust, context: Context) -> None:
        """:raises MissingError: a library is not installed."""
        from broker.blob_store import BlobStore
        from nodes.federated.examples import ExampleStore
        from nodes.federated.pool import Pool
        from nodes.federated.replay import Stock
        from nodes.federated.uploads import OnDisk

        self._options, self._config, self._trust, self._context = options, config, trust, context
        scale, numbers = float(options.scale), options.target == "number"
        self.examples = ExampleStore(
            context.state / "pool.sqlite",
            keep=options.keep,
            size=options.size,
            policy=options.policy,
            numbers=numbers,
            held=options.held,
            factor=scale,
        )
        self.stock = Stock(self.examples, options.replay)
        self._uploads = BlobStore(context.state / "pool.uploads", UPLOADS, durable=False)
        self._pool = Pool(
            config.job,
            self.examples,
            Fits(lambda: kinds.trainer(config.trainer, context), scale, classes=not numbers),
            signer=trust.signer,
            devices=trust.devices,
            numbers=numbers,
            on_news=self._news,
            place=OnDisk(self._uploads),
        )
        self._parties: list[Party] = []
        self._learner: tuple[Party, Any] | None = None

    @property
    def trust(self) -> CoordinatorTrust:
        """The coordinator's: it knows our client, too."""
        trust = self._trust
        if trust.devices is None or trust.signer is None:
            return trust
        return replace(trust, devices={**trust.devices, CLIENT: trust.signer.public})

    def solo(self, pace: Pace, rules: Rules, trainer: Trainer, evaluate: Evaluate | None) -> Solo:
        """Who learns from it where no clients are asked; to be carried by the node."""
        from nodes.federated.alone import Solo

        return Solo(
            rules,
            trainer,
            self.stock,
            every=pace.every / 1e9,
            fresh=pace.fresh,
            least=self._options.least,
            evaluate=evaluate,
            trust=self._trust,
        )

    async def open(self, lead: Party | None) -> None:
        """Connect.

        :param lead: the party of :meth:`solo`; None: a client of our own learns.
        :raises BusError: the broker refuses us.
        """
        from nodes.federated.client import Client

        config, signer = self._config, self._trust.signer
        if lead is not None:
            self._learner = (lead, lead.machine)
        else:
            client = Client(
                config.job,
                CLIENT,
                kinds.trainer(config.trainer, self._context),
                self.stock,
                self._count,
                compressors=kinds.compressor,
                trust=ClientTrust(signer, None if signer is None else signer.public),
            )
            self._learner = (self._carried(client, "pool-client"), client)
        self._carried(self._pool, "pool")
        for party in self._parties:
            await party.open()

    def _carried(self, machine: Any, name: str) -> Party:
        from nodes.federated.party import Party
        from nodes.federated.store import Store

        config, context = self._config, self._context
        store = Store(context.state / f"{config.job}.{name}.sqlite")
        connect, root = config.connect(context, name), config.root(context)
        party = Party(machine, store, connect, root, node=context.node, job=config.job)
        self._parties.append(party)
        return party

    def _count(self) -> int:
        return len(self.stock) if len(self.stock) >= self._options.least else 0

    def _news(self, what: str, told: dict[str, Any]) -> None:
        if what:
            log.warning(what, node=self._context.node, job=self._config.job, **told)
        if self._learner is not None:
            party, machine = self._learner
            party.tell(machine.fed)

    async def run(self) -> None:
        """Until cancelled, or something fails that must not."""
        await asyncio.gather(*(party.run() for party in self._parties))

    def shut(self) -> None:
        """The job is over: :meth:`run` ends when that is said."""
        self._parties[-1].tell(self._pool.shut)

    async def close(self) -> None:
        """Leave."""
        for party in self._parties:
            await party.close()
        self._uploads.close()
        self.examples.close()
