"""Learn from labelled messages where they arise: one client of a federated job. The data stay here; what goes out is the update.

``{train: {job: digits, trainer: {mlp: {layers: [64, 32, 10]}}, label: label}}``: what comes in is kept in a store of examples
on this node's disk, within a budget. When the job's ``federate`` node, anywhere, calls a round, the model that it sends is
trained on them. The node is done when its inputs have ended and the job is over.

With ``alone`` there is no ``federate``: the node learns by itself from what comes, and publishes each model as that would.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import BeforeValidator, Field, field_validator, model_validator

from broker.memory import give_back
from nodes import log
from nodes.federated import key_options, secure_options
from nodes.federated.fitting import Alone, check_held_out, evaluation
from nodes.federated.label_options import LabelOptions
from nodes.federated.options import JobOptions, level
from nodes.federated.permission import EVERY, When
from nodes.federated.telling import tell
from nodes.operator import Context, Sink
from nodes.privacy.least import Insists
from schemas.errors import ConfigError, Problem, RejectedError
from schemas.expressions import Number
from schemas.messages import Message
from schemas.units import Size

if TYPE_CHECKING:
    from nodes.federated.alone import Solo
    from nodes.federated.client import Client
    from nodes.federated.examples import Example, ExampleStore
    from nodes.federated.party import Party
    from nodes.federated.replay import Stock
    from nodes.trainers._trainer import Examples, Trainer

TOLD_EVERY = 2.0
"""Seconds after which the client is told again that there are other examples."""


class Config(LabelOptions, JobOptions):
    """Options of ``train``."""

    client: str | None = Field(
        None, description="name in the job; it and the examples belong together. The node's name if left out"
    )
    scale: Number = Field(1.0, description="every value is multiplied by this; may be written 1/255")
    keep: int = Field(5000, ge=1, le=10_000_000, description="most examples that are kept")
    size: Size = Field(64 * 10**6, ge=1024, description="most bytes of examples that are kept")
    policy: Literal["latest", "reservoir", "balanced"] = Field(
        "latest",
        description="which are kept when there are more. latest: the newest; reservoir: a uniform sample of all that came;"
        " balanced: likewise, of each class about as many",
    )
    least: int = Field(1, ge=1, description="examples that must be there before it takes part")
    replay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="learns what is new, and as much of what it learned before as makes this share of the whole, classes in"
        " equal parts; all that is kept, each time, if left out",
    )
    held: float = Field(
        0.0, ge=0, lt=1, description="share of the examples that is set aside: never trained on, evaluated on instead"
    )
    alone: Alone | None = Field(
        None, description="learns by itself, without federate: when, how, and measured on what; not if left out"
    )
    coordinator: str | None = Field(None, min_length=1, description=key_options.COORDINATOR)
    devices: str | dict[str, str] | None = Field(None, min_length=1, description=key_options.OTHERS)
    privacy: Insists | None = Field(
        None, description="what this device insists on; a round that asks for less is not answered"
    )
    secure: Annotated[
        int | None, BeforeValidator(secure_options.bare_number, json_schema_input_type=int | bool | None)
    ] = Field(
        None,
        ge=secure_options.LEAST,
        description="trains only for secure sums, of so many clients at least; true: 3. If left out, also where the"
        " coordinator sees its update",
    )
    when: When = Field(When.model_validate({}), description="conditions under which it may train; always, if left out")

    @field_validator("client")
    @classmethod
    def _named(cls, name: str | None) -> str | None:
        return None if name is None else level(name)

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.target == "number" and self.policy == "balanced":
            raise ValueError("policy: labels that are numbers have no classes to balance")
        return self

    def check(self, context: Context) -> None:
        super().check(context)
        if self.alone is not None:
            if self.trainer.name == "personal":
                raise ConfigError(
                    Problem(("trainer",), "personal layers are kept from others, and with 'alone' there are none")
                )
            check_held_out(self.alone.evaluate, context, "alone", "evaluate")
            if self.secure is not None:
                said = "with 'alone' nothing is sent to anybody, so there are no sums"
                raise ConfigError(Problem(("secure",), said, on_key=True))
        key_options.check(context, self.key, self.coordinator, self.devices)
        if self.devices is not None and self.key is None:
            raise ConfigError(Problem(("devices",), "needs 'key' too: each device signs its part", on_key=True))
        self.check_labels(context)

    def whole(self) -> str:
        return "each would be a client of the same name, with a part of its examples"


def build(config: Config, context: Context) -> Sink:
    """A :class:`TrainSink`."""
    return TrainSink(config, context)


class TrainSink(Sink):
    """Keeps examples, and carries the client of the job beside."""

    max_batch = 256
    linger = 0.05

    def __init__(self, config: Config, context: Context) -> None:
        self._config = config
        self._context = context
        self._store: ExampleStore | None = None
        self._party: Party | None = None
        self._machine: Client | Solo | None = None
        self._trainer: Trainer | None = None
        self._forms: set[tuple[str, tuple[int, ...]]] = set()
        self._outputs: int | None = None
        self._told = 0.0
        self._rounds = 0
        self._over = asyncio.Event()

    # -- life ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """:raises BusError: the broker refuses us.
        :raises MissingError: the trainer's library is not installed.
        """
        from nodes.federated import kinds
        from nodes.federated.party import Party
        from nodes.federated.store import Store

        config, context = self._config, self._context
        give_back()
        self._trainer = kinds.trainer(config.trainer, context)
        examples = self._gathering()
        if config.alone is None:
            self._machine = self._client(self._trainer, examples)
            kept = Store(context.state / f"{config.job}.sqlite")
        else:
            self._machine = self._solo(config.alone, self._trainer, examples)
            kept = Store(context.state / f"{config.job}.alone.sqlite", synced=("model",))
        self._party = Party(
            self._machine,
            kept,
            config.connect(context, "train"),
            config.root(context),
            on_rows=self._tell_rounds,
            node=context.node,
            job=config.job,
        )
        self._rounds = kept.last
        await self._party.open()

    def _gathering(self) -> Callable[[], Examples]:
        """Open what examples are kept in; gives what there is to train on."""
        from nodes.federated.examples import ExampleStore
        from nodes.federated.replay import Stock

        config, context = self._config, self._context
        self._labelled = config.reading(context)
        self._store = ExampleStore(
            context.state / "examples.sqlite",
            keep=config.keep,
            size=config.size,
            policy=config.policy,
            numbers=config.target == "number",
            held=config.held,
            factor=float(config.scale),
        )
        return Stock(self._store, config.replay)

    def _client(self, trainer: Trainer, examples: Callable[[], Examples]) -> Client:
        from nodes.federated import kinds
        from nodes.federated.client import Client
        from nodes.privacy.least import Least

        config, insists = self._config, self._config.privacy
        name = config.client or self._context.node
        return Client(
            self._config.job,
            name,
            trainer,
            examples,
            self._count,
            compressors=kinds.compressor,
            trust=key_options.client_trust(config.key, config.coordinator, self._context, config.devices),
            least=None if insists is None else Least(insists),
            company=config.secure or 0,
        )

    def _solo(self, alone: Alone, trainer: Trainer, examples: Callable[[], Examples]) -> Solo:
        """:raises ConfigError: the examples to evaluate on are not such, or do not fit the model."""
        from nodes.federated.alone import Solo

        held = alone.evaluate
        return Solo(
            alone.rules(self._config.job),
            trainer,
            cast("Stock", examples),
            every=alone.every / 1e9,
            fresh=alone.fresh,
            least=self._config.least,
            evaluate=None if held is None else evaluation(held, trainer, self._context),
            trust=key_options.coordinator_trust(self._config.key, None, self._context),
        )

    def _count(self) -> int:
        count = 0 if self._store is None else self._store.learnable
        return count if count >= self._config.least else 0

    async def beside(self) -> None:
        """The client's part of the job."""
        if self._party is None or self._machine is None:
            return
        asking = asyncio.create_task(self._ask_permission(self._party, self._machine))
        try:
            await self._party.run()
        finally:
            asking.cancel()
        log.info("the job is over", node=self._context.node, job=self._config.job, why=self._machine.outcome)
        self._over.set()

    def _tell_rounds(self) -> None:
        """What was learned alone; a client has no rows."""
        if self._party is not None:
            for number, row in self._party.store.rows(self._rounds):
                self._rounds = number
                tell(self._context.node, row)

    async def _ask_permission(self, party: Party, machine: Client | Solo) -> None:
        """Look again and again whether it may train."""
        when, before = self._config.when, ""
        while when.model_fields_set:
            now = datetime.now()  # noqa: DTZ005 - hours are those of the wall clock
            if (why := when.why_not(now, self._context.path)) != before:
                before = why
                log.info("training waits" if why else "training may go on", node=self._context.node, reason=why)
                party.tell(partial(machine.permit, why))
            await asyncio.sleep(EVERY)

    async def finish(self) -> None:
        if self._party is not None and self._config.alone is not None:
            self._party.tell(cast("Solo", self._machine).ended)
        self._tell(now=True)
        await self._over.wait()

    async def close(self) -> None:
        if self._party is not None:
            await self._party.close()
        if self._store is not None:
            self._store.close()

    # -- examples ------------------------------------------------------------------------------------------------

    async def write(self, messages: Sequence[Message]) -> None:
        store = self._store
        if store is None:
            raise RuntimeError("the sink is not open")
        examples: list[Example] = []
        rejected: list[tuple[int, str]] = []
        for i, message in enumerate(messages):
            try:
                found = self._labelled.read(message)
                for example in found:
                    await self._fit(example)
            except ValueError as error:
                rejected.append((i, str(error)))
            else:
                examples += found
        before = store.learnable
        await asyncio.to_thread(store.add, examples)
        self._tell(now=before < self._config.least)
        if rejected:
            raise RejectedError(rejected)

    async def _fit(self, example: Example) -> None:
        """Look whether the model takes such an example: by asking it, once for each form.

        :raises ValueError: it does not.
        """
        form = (example.x.dtype.str, example.x.shape)
        known = self._store.form if self._store is not None else None
        if known is not None and form != known:
            raise ValueError(f"{_said(form)}; the examples before are {_said(known)}")
        if form not in self._forms:
            if self._forms:
                raise ValueError(f"{_said(form)}; the examples before are {_said(next(iter(self._forms)))}")
            self._outputs = await self._ask_model(example, form)
            self._forms.add(form)
        if self._config.target == "class" and self._outputs is not None and example.y >= self._outputs:
            raise ValueError(f"the class {example.y}; the model knows 0 to {self._outputs - 1}")

    async def _ask_model(self, example: Example, form: tuple[str, tuple[int, ...]]) -> int | None:
        """How many answers it has."""
        import numpy as np

        party, trainer = self._party, self._trainer
        if party is None or trainer is None:
            raise RuntimeError("the sink is not open")
        x = example.x[None].astype(np.float32) * np.float32(self._config.scale)
        try:
            answers = await party.apart(lambda: trainer.predict(x))
        except Exception as error:  # noqa: BLE001 - any library's own error says that it does not fit
            raise ValueError(f"the model does not take {_said(form)}: {error}") from None
        return int(answers.shape[1]) if answers.ndim == 2 else None

    def _tell(self, *, now: bool) -> None:
        """Tell the client that there are other examples, at once or now and then."""
        if self._party is None or self._machine is None:
            return
        if now or time.monotonic() - self._told >= TOLD_EVERY:
            self._told = time.monotonic()
            self._party.tell(self._machine.fed)


def _said(form: tuple[str, tuple[int, ...]]) -> str:
    import numpy as np

    return f"{np.dtype(form[0])} {list(form[1])}"
