"""Lead a federated job: call rounds, make one model of the clients' updates, and tell how it goes.

``{federate: {job: digits, trainer: {mlp: {layers: [64, 32, 10]}}, rounds: 20}}``: the clients are the job's ``train`` nodes,
wherever they run. What comes out is one row a round, so that the curve is in a database or on a dashboard like any other
readings. The node is done when the job is over; started again, it goes on with the round that it was at.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from nodes import log
from nodes.choice import Chosen, choice
from nodes.federated import key_options, kinds, secure_options
from nodes.federated.fitting import Evaluated, Fitting, check_held_out, evaluation
from nodes.federated.options import JobOptions, Of, known
from nodes.federated.pooled import Pooled
from nodes.federated.secure_options import SecureSums
from nodes.federated.telling import tell
from nodes.federated.weights import Shape
from nodes.operator import Chunk, Context, Draft, Flow, Source
from nodes.privacy.dp import Privacy
from schemas.errors import ConfigError, Problem
from schemas.units import Duration

if TYPE_CHECKING:
    from broker.blob_store import BlobStore
    from nodes.federated.alone import Solo
    from nodes.federated.coordinator import Coordinator
    from nodes.federated.line import Way
    from nodes.federated.machine import Machine
    from nodes.federated.party import Party
    from nodes.federated.pooled import PoolSide
    from nodes.federated.rules import Rules
    from nodes.federated.trust import CoordinatorTrust
    from nodes.strategies._strategy import Strategy

    Strategic = Chosen
    Compressing = Chosen
else:
    Strategic, Compressing = choice("strategy"), choice("compressor")

SECOND = 10**9
UPLOADS = 4 * 10**9
"""Bytes that large updates on their way may take on the disk, together. What has arrived of them outlives a crash."""
SHUT = 10.0
"""Seconds that it may take to say that a job's pool is closed."""
TEXTS = ("job", "status", "why")
WHOLE = ("round", "version", "clients", "asked", "samples", "refused", "stale", "bytes_up", "bytes_down")
REAL = ("accuracy", "loss", "local_accuracy", "local_loss", "train_loss", "epsilon", "seconds")
FIELDS = frozenset({*TEXTS, *WHOLE, *REAL})
"""Columns of a round's row."""
ABOVE = "above"
"""One column more at a site: the number of the round of the job above."""
_ENDS = "a job that is a part of another one ends with that one"
NOT_AT_A_SITE = {
    "until": _ENDS,
    "stall": _ENDS,
    "time": _ENDS,
    "wait": "a site waits for its clients until the round of the job above ends",
    "tolerance": "which model is kept is for the job above to say: say it there",
    "buffer": "all updates of a site begin with the model of one round above, so they cannot come at any time",
    "pool": "what is shared is for the leader of the job above to take",
    "every": "when there is a round is for the job above to say",
    "keep": "a site goes back when the job above does: say it there",
    "privacy": "its budget is for a number of rounds that only the job above knows: say it there",
    "secure": "a site does not lead secure sums",
}
"""What has no meaning with ``of``, and why."""


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Clients(_Options):
    """How many clients there must be."""

    least: int = Field(1, ge=1, description="that must be here before the first round")
    share: float = Field(1.0, gt=0, le=1, description="of those that are here, are asked in a round")
    most: int | None = Field(None, ge=1, description="that are asked in one round; no limit if left out")
    quorum: int = Field(1, ge=1, description="updates without which a round counts for nothing")

    @model_validator(mode="after")
    def _fits(self) -> Clients:
        if self.most is not None and self.most < self.quorum:
            raise ValueError(f"most: {self.most} are asked, and quorum is {self.quorum}")
        return self


class Limits(_Options):
    """What an update may be at most; beyond it is refused, and kept to be looked at."""

    norm: float | None = Field(
        None, gt=0, description="Euclidean norm of the update; a hundred times the model's own if left out"
    )
    samples: int = Field(1_000_000, ge=1, description="examples that a client may say it has: the weight of its update")


class Buffer(_Options):
    """Without rounds: the model moves on each time that so many updates are there (FedBuff, Nguyen et al. 2022)."""

    size: int = Field(10, ge=1, description="updates that make a new model")
    stale: int = Field(20, ge=0, description="models that an update may be behind")


def _bare_job(value: Any) -> Any:
    return {"job": value} if isinstance(value, str) else value


def _bare_size(value: Any) -> Any:
    return {"size": value} if isinstance(value, int) and not isinstance(value, bool) else value


class Config(JobOptions):
    """Options of ``federate``."""

    strategy: Strategic = Field(
        cast("Any", "fedavg"),
        validate_default=True,
        description="how updates become a model, one of the strategies, with its options if need be",
    )
    compress: Compressing | None = Field(
        None, description="how clients make their updates smaller, one of the compressors; not at all if left out"
    )
    of: Annotated[Of | None, BeforeValidator(_bare_job, json_schema_input_type=Of | str | None)] = Field(
        None,
        description="this job is a part of another one, and its leader one client there (a site); that job's name, or a map",
    )
    rounds: int = Field(
        10,
        ge=1,
        le=1_000_000,
        description="that are to succeed; then the job is over. With 'of': for each round of the job above, 1 if left out",
    )
    fit: Fitting = Field(Fitting.model_validate({}), description="how each client trains in a round")
    seed: int = Field(
        0, ge=0, lt=2**31, description="of the choice of clients, and of the order in which each sees its examples"
    )
    clients: Clients = Field(Clients.model_validate({}), description="how many clients there must be")
    deadline: Duration = Field(60 * SECOND, gt=0, description="for one round; at it, it ends with what is there")
    grace: Duration = Field(2 * SECOND, description="what is waited for the others once there is a quorum")
    gather: Duration = Field(
        0, description="what is waited for more clients before the first round, when the least are here"
    )
    wait: Duration = Field(600 * SECOND, gt=0, description="for clients, while no round can begin; then the job ends")
    retries: int = Field(5, ge=0, description="rounds without success in a row after which the job ends")
    evaluate: Evaluated = Field(None, description="examples to evaluate each model on; a path, or a map")
    report: bool = Field(False, description="clients evaluate the model that they get on their own examples, and tell")
    until: dict[str, float] = Field(
        {}, max_length=1, description="ends the job when a metric is reached, e.g. {accuracy: 0.97} or {loss: 0.1}"
    )
    stall: int | None = Field(None, ge=1, description="rounds without a better 'watch' after which the job ends")
    keep: int = Field(3, ge=0, le=1000, description="older models that are kept, for 'penstock fl rollback'")
    watch: str = Field("accuracy", description="the metric that 'stall' and 'tolerance' look at")
    tolerance: float | None = Field(
        None, ge=0, description="a new model is thrown away if 'watch' is worse than the best by more than this"
    )
    time: Duration | None = Field(None, gt=0, description="for the whole job")
    every: Duration = Field(
        0,
        description="a round at each multiple of it since 1970 (1h: at each full hour, UTC); one after the other if left out",
    )
    buffer: Annotated[Buffer | None, BeforeValidator(_bare_size, json_schema_input_type=Buffer | int | None)] = Field(
        None, description="asynchronous: no rounds, a new model for so many updates; a number, or a map"
    )
    limits: Limits = Field(Limits.model_validate({}), description="what an update may be at most")
    devices: str | dict[str, str] | None = Field(None, min_length=1, description=key_options.DEVICES)
    privacy: Privacy | None = Field(None, description="differential privacy of whole clients; none if left out")
    secure: Annotated[
        SecureSums | None, BeforeValidator(secure_options.bare, json_schema_input_type=SecureSums | bool | None)
    ] = Field(
        None, description="only sums of updates are seen, by nobody more than that: true, or a map; not if left out"
    )
    pool: Pooled | None = Field(
        None, description="takes examples that gateways give (pool) and learns from them: alone, or beside the clients"
    )

    def check(self, context: Context) -> None:
        super().check(context)
        key_options.check(context, self.key, devices=self.devices)
        if self.devices is not None and self.key is None:
            raise ConfigError(Problem(("devices",), "needs 'key' too: clients seal their updates to it", on_key=True))
        with self.strategy.at("strategy"):
            self.strategy.options.check(context)
        if self.compress is not None:
            with self.compress.at("compress"):
                self.compress.options.check(context)
        check_held_out(self.evaluate, context, "evaluate")
        if self.of is not None:
            self._check_of(self.of, context)
        if wrong := list(secure_options.problems(self)):
            raise ConfigError(*wrong)
        if self.pool is not None and (why := self.pool.wrong(self)):
            raise ConfigError(Problem(("pool",), why, on_key=True))
        if self.privacy is not None and (why := self._not_private()):
            raise ConfigError(Problem(("privacy",), why, on_key=True))

    def _check_of(self, of: Of, context: Context) -> None:
        known(of.broker, context, "of", "broker")
        if of.root(context) == self.root(context) and (of.broker or context.broker) == (self.broker or context.broker):
            raise ConfigError(Problem(("of",), f"the job {of.job!r} cannot be a part of itself", on_key=True))
        problems = [
            Problem((key,), why, on_key=True) for key, why in NOT_AT_A_SITE.items() if key in self.model_fields_set
        ]
        if problems:
            raise ConfigError(*problems)

    def _not_private(self) -> str:
        """What does not go together with privacy."""
        if self.buffer is not None:
            return "its budget counts rounds, and with 'buffer' there are none"
        if self.report:
            return "what clients report of their own examples has no noise in it: leave 'report' out"
        if self.tolerance is not None:
            return "a model that is thrown away has cost its part of the budget: leave 'tolerance' out"
        strategy = kinds.strategy(self.strategy)
        if not strategy.sums or strategy.extras((Shape("w", (1,)),)):
            return f"{self.strategy.name} has to see each update, and may only have their sum"
        return ""

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        del inputs, context
        return {"out": Flow("readings/1", FIELDS if self.of is None else FIELDS | {ABOVE})}

    def accepts(self) -> frozenset[str]:
        return frozenset()

    def whole(self) -> str:
        return "one leads a job"

    def chosen_strategy(self) -> Strategy:
        """The strategy, within the job's privacy.

        :raises ConfigError: no noise is enough for the budget, or the noise is too small for one round.
        :raises MissingError: privacy needs a library.
        """
        strategy = kinds.strategy(self.strategy)
        if self.privacy is None:
            return strategy
        from nodes.privacy.private import Private

        private = Private(strategy, self.privacy, self.rounds)
        if private.over():
            raise ConfigError(f"privacy: one round with a noise of {private.noise:g} costs more than the budget")
        return private

    def rules(self) -> Rules:
        """As the coordinator takes them."""
        from nodes.federated import rules

        clients, buffer = self.clients, self.buffer
        more: dict[str, Any] = {} if buffer is None else {"stale": buffer.stale}
        return rules.Rules(
            job=self.job,
            rounds=self.rounds,
            least=max(clients.least, 1 if self.secure is None else self.secure.least),
            share=clients.share,
            most=clients.most,
            quorum=clients.quorum,
            deadline=self.deadline / SECOND,
            grace=self.grace / SECOND,
            gather=self.gather / SECOND,
            wait=self.wait / SECOND,
            retries=self.retries,
            fit=self.fit.model_dump(),
            seed=self.seed,
            compress=None if self.compress is None else self.compress.plain(),
            evaluate=self.report,
            buffer=None if buffer is None else buffer.size,
            target=next(iter(self.until.items()), None),
            stall=self.stall,
            watch=self.watch,
            tolerance=self.tolerance,
            time=None if self.time is None else self.time / SECOND,
            every=self.every / SECOND,
            keep=self.keep,
            secure=secure_options.rules(self),
            limits=rules.Limits(norm=self.limits.norm, samples=1 if self.privacy else self.limits.samples),
            **more,
        )


def build(config: Config, context: Context) -> Source:
    """A :class:`FederateSource`."""
    return FederateSource(config, context)


class FederateSource(Source):
    """Carries the coordinator of a job. Positions are numbers of rows, which are kept with the job."""

    def __init__(self, config: Config, context: Context) -> None:
        self._config = config
        self._context = context
        self._party: Party | None = None
        self._coordinator: Coordinator | Solo | None = None
        self._pool: PoolSide | None = None
        self._uploads: BlobStore | None = None
        self._after = 0
        self._news = asyncio.Event()

    async def open(self, position: Any) -> str:
        """:raises BusError: the broker refuses us.
        :raises MissingError: the trainer's library is not installed.
        :raises ConfigError: the examples to evaluate on are not such, or do not fit the model.
        """
        from nodes.federated.party import Party
        from nodes.federated.store import Store

        config, context = self._config, self._context
        self._after = position or 0
        if config.secure is not None:
            from nodes.privacy.keys import require

            require()
        trust = key_options.coordinator_trust(config.key, config.devices, context)
        if config.pool is not None:
            from nodes.federated.pooled import PoolSide

            self._pool = PoolSide(config.pool, config, trust, context)
            trust = self._pool.trust
        machine, ways = self._leader(trust)
        store = Store(context.state / f"{config.job}.sqlite", synced=("model",))
        self._party = Party(
            machine,
            store,
            config.connect(context, "federate"),
            config.root(context),
            on_rows=self._news.set,
            ways=ways,
            node=context.node,
            job=config.job,
        )
        await self._party.open()
        if self._pool is not None and config.pool is not None:
            await self._pool.open(None if config.pool.alone is None else self._party)
        return store.stream

    def _leader(self, trust: CoordinatorTrust) -> tuple[Machine, list[Way]]:
        """Who makes the models (of clients' updates, or of the pool), and the buses beside the job's own."""
        from broker.blob_store import BlobStore
        from nodes.federated.siting import lead
        from nodes.federated.uploads import OnDisk

        config, context = self._config, self._context
        trainer, rules = kinds.trainer(config.trainer, context), config.rules()
        evaluate = None if config.evaluate is None else evaluation(config.evaluate, trainer, context)
        if self._pool is not None and config.pool is not None and config.pool.alone is not None:
            solo = self._coordinator = self._pool.solo(config.pool.alone, rules, trainer, evaluate)
            return solo, []
        self._uploads = BlobStore(context.state / f"{config.job}.uploads", UPLOADS, durable=False)
        machine, self._coordinator, ways = lead(
            config.of,
            config.model_dump(include={"fit", "rounds", "seed"}, exclude_unset=True),
            rules,
            config.chosen_strategy(),
            trainer.weights(),
            context,
            key_options.client_trust(config.key, None if config.of is None else config.of.coordinator, context),
            place=OnDisk(self._uploads),
            trust=trust,
            compressor=kinds.compressor(rules.compress),
            evaluate=evaluate,
        )
        return machine, ways

    async def _lead(self, party: Party) -> None:
        """Until the job is over."""
        leading = asyncio.create_task(party.run(), name="federate")
        tasks = {leading}
        if self._pool is not None:
            tasks.add(asyncio.create_task(self._pool.run(), name="pool"))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            await leading
            if self._pool is not None and self._coordinator is not None and self._coordinator.outcome != "fenced":
                self._pool.shut()
                await asyncio.wait(tasks, timeout=SHUT)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def chunks(self) -> AsyncIterator[Chunk]:
        party = self._party
        if party is None:
            return
        leading = asyncio.create_task(self._lead(party))
        leading.add_done_callback(lambda _: self._news.set())
        try:
            while True:
                self._news.clear()
                ended = leading.done()
                for number, row in party.store.rows(self._after):
                    self._after = number
                    tell(self._context.node, row)
                    yield Chunk(self._drafts(row), number)
                if ended and not party.store.rows(self._after, 1):
                    break
                if not ended:
                    await self._news.wait()
            leading.result()
            why = "" if self._coordinator is None else self._coordinator.outcome
            log.info("the job is over", node=self._context.node, job=self._config.job, why=why)
        finally:
            leading.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await leading

    def _drafts(self, row: dict[str, Any]) -> list[Draft]:
        """A round's row as readings."""
        import numpy as np

        from schemas.messages import Column, Readings

        columns: dict[str, Column] = {"job": [self._config.job]}
        columns |= {name: [str(row.get(name) or "")] for name in TEXTS[1:]}
        whole = WHOLE if self._config.of is None else (*WHOLE, ABOVE)
        columns |= {name: np.array([row.get(name, 0)], np.int64) for name in whole}
        columns |= {name: np.array([row.get(name, math.nan)], np.float64) for name in REAL}
        return [Draft(self._config.job, int(row["time"]), Readings(n=1, columns=columns), str(row["round"]))]

    async def close(self) -> None:
        if self._party is not None:
            await self._party.close()
            self._party = None
        if self._pool is not None:
            await self._pool.close()
            self._pool = None
        if self._uploads is not None:
            self._uploads.close()
            self._uploads = None
