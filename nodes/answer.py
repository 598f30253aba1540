"""Answer a fleet's questions from the rows that come by: how many of each, histograms. The rows stay here; counts go out.

``{answer: {job: fleet, questions: {state: [idle, run, fault], heat: {edges: {low: 0, high: 100, bins: 50}}}}}``: of each row only
which counts it is part of is kept on this node's disk. When the job's ``ask`` node, anywhere, asks, the counts go to it, with
the noise that the job has. Questions that are not in these options are not answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from nodes import log, train
from nodes.choice import Chosen
from nodes.federated.options import MemberOptions, level
from nodes.federated.permission import When
from nodes.federated.questions import Questions
from nodes.operator import Context, Flow, Sink
from nodes.privacy.least import Insists
from schemas.errors import ConfigError, Problem, RejectedError, did_you_mean
from schemas.messages import Message
from schemas.rows import ROW_TYPES
from schemas.units import Duration

if TYPE_CHECKING:
    from nodes.federated.counted import CountedRows
    from nodes.federated.counted import Rows as Counted
    from nodes.trainers._trainer import Examples

WARN_EVERY = 60.0
"""Seconds after which it is said again that rows go for want of room."""


class Config(Questions, MemberOptions):
    """Options of ``answer``."""

    window: Duration | None = Field(
        None,
        gt=0,
        description="rows of the last so long, by their own time, are in each answer; if left out each row is in one answer: the"
        " first after it came that was used",
    )
    client: str | None = Field(
        None, description="name in the job; it and the rows belong together. The node's name if left out"
    )
    keep: int = Field(
        1_000_000, ge=1, le=100_000_000, description="most rows that wait; the oldest go, and the log says so"
    )
    privacy: Insists | None = Field(
        None, description="what this device insists on; a round that asks for less is not answered"
    )
    when: When = Field(When.model_validate({}), description="conditions under which it may answer; always, if left out")

    @field_validator("client")
    @classmethod
    def _level_too(cls, name: str | None) -> str | None:
        return None if name is None else level(name)

    @property
    def trainer(self) -> Chosen:
        """What counts."""
        return counting(self)

    def accepts(self) -> frozenset[str]:
        return ROW_TYPES

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        del context
        for flow in inputs:
            if flow.fields is None or flow.type == "event/1":
                continue
            for name, asked in self.questions.items():
                if (column := asked.field or name) not in flow.fields:
                    where = ("questions", name, *(("field",) if asked.field else ()))
                    said = f"the rows have no column {column!r}{did_you_mean(column, flow.fields)}"
                    raise ConfigError(Problem(where, said, on_key=not asked.field))
        return {}

    def whole(self) -> str:
        return "each would be a client of the same name, with a part of its rows"


def counting(questions: Questions) -> Chosen:
    """The trainer of both sides."""
    from nodes.trainers import count

    options = count.Config.model_construct(questions=questions.questions, weigh=questions.weigh)
    return Chosen("trainer", "count", options, bare=False, inner=None)


def build(config: Config, context: Context) -> Sink:
    """An :class:`AnswerSink`."""
    return AnswerSink(config, context)


class AnswerSink(train.TrainSink):
    """Keeps what rows count for, and carries the client of the job beside."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config.carried(train.Config, trainer=config.trainer), context)
        self._answers = config
        self._asked = list(config.all().values())
        self._rows: CountedRows | None = None
        self._complained = -WARN_EVERY

    def _gathering(self) -> Callable[[], Examples]:
        from nodes.federated.counted import CountedRows
        from nodes.trainers.count import Count

        config = self._answers
        form = " ".join(config.all())
        path = self._context.state / "rows.sqlite"
        rows = self._rows = CountedRows(path, form, len(self._asked), keep=config.keep, window=config.window)
        if isinstance(self._trainer, Count):
            self._trainer.once, self._trainer.settled = config.window is None, rows.settle
        return rows.to_learn

    def _count(self) -> int:
        return 1  # nothing counted is an answer, too; and how many rows there are is nobody's business

    async def write(self, messages: Sequence[Message]) -> None:
        store = self._rows
        if store is None:
            raise RuntimeError("the sink is not open")
        read: list[Counted] = []
        rejected: list[tuple[int, str]] = []
        for i, message in enumerate(messages):
            try:
                read.append(self._placed(message))
            except ValueError as error:
                rejected.append((i, str(error)))
        before = store.displaced
        await asyncio.to_thread(store.add, read)
        if store.displaced > before and time.monotonic() - self._complained >= WARN_EVERY:
            self._complained = time.monotonic()
            log.warning("rows went before they were counted", node=self._context.node, rows=store.displaced)
        if rejected:
            raise RejectedError(rejected)

    def _placed(self, message: Message) -> Counted:
        """Which counts the rows of a message are part of.

        :raises ValueError: it has none of the columns, or texts where numbers are counted.
        """
        import numpy as np

        from nodes.federated.analytics import places
        from nodes.federated.counted import Rows as Counted
        from schemas.rows import rows

        found = rows([message])
        if not any(question.field in found.columns for question in self._asked):
            names = ", ".join(sorted({question.field for question in self._asked}))
            raise ValueError(f"it has no column that is asked for ({names})")
        placed = np.full((found.n, len(self._asked)), -1, np.int32)
        for i, question in enumerate(self._asked):
            if question.field in found.columns:
                try:
                    placed[:, i] = places(question, found.columns[question.field])
                except ValueError:
                    raise ValueError(f"the column {question.field!r} has texts, and numbers are counted") from None
        return Counted(message.id, found.time, placed)

    async def finish(self) -> None:
        await self._over.wait()

    async def close(self) -> None:
        await super().close()
        if self._rows is not None:
            self._rows.close()
