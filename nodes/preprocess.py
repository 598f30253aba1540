"""Change, choose and reshape what was sensed, in steps.

``{preprocess: {steps: [{resize: [96, 96]}, {scale: 1/255}]}}``: each step is a kind of :mod:`nodes.steps`, run in the
order given. Reading steps that stand together work on one table of all messages of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from nodes import kinds
from nodes.choice import Chosen, choice
from nodes.operator import Context, Emit, Flow, Operator
from nodes.options import Options
from nodes.steps._stack import FrameStage
from nodes.steps._step import FrameStep, Step
from nodes.steps._table import RowStage, RowStep
from schemas.errors import ConfigError, Problem
from schemas.messages import Message

if TYPE_CHECKING:
    Entry = Chosen
else:
    Entry = choice("step")


def variants() -> dict[str, type[Options]]:
    """Every step with its options."""
    return {name: cast("type[Options]", kinds.module("step", name).Config) for name in kinds.names("step")}


class Config(Options):
    """Options of ``preprocess``."""

    steps: list[Entry] = Field(min_length=1, max_length=64, description="what is done, in order")

    def check(self, context: Context) -> None:
        for i, entry in enumerate(self.steps):
            with entry.at("steps", i):
                entry.options.check(context)

    def accepts(self) -> frozenset[str] | None:
        return self.steps[0].options.accepts()

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        out: dict[str, Flow] = {}
        for flow in inputs:
            for port, made in self._follow(flow, context).items():
                out[port] = made if port not in out else self._both(port, out[port], made)
        return out

    def _follow(self, flow: Flow, context: Context) -> dict[str, Flow]:
        """One input through all steps."""
        leaving: dict[str, Flow] = {}
        for i, entry in enumerate(self.steps):
            with entry.at("steps", i):
                flows = entry.options.emits([flow], context)
                flow = flows.pop("out")
                for port, made in flows.items():
                    if port in leaving:
                        raise ConfigError(f"port {port!r} is an earlier step's already")
                    leaving[port] = made
        return {"out": flow, **leaving}

    @staticmethod
    def _both(port: str, one: Flow, other: Flow) -> Flow:
        if one.type != other.type:
            raise ConfigError(Problem(("steps",), f"port {port!r} would send {one.type} and {other.type}"))
        known = one.fields is not None and other.fields is not None
        return Flow(one.type, (one.fields or frozenset()) | (other.fields or frozenset()) if known else None)


class Pipeline(Operator):
    """The steps, one after the other.

    Rows after a step that gathers them (window, resample) are that step's own, not the sender's, so what later steps do
    with them is not in the books again.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = list(steps)
        self._gatherer = next((i for i, s in enumerate(self.steps) if s.absorbs), len(self.steps))
        self._holders = [
            s for s in self.steps[: self._gatherer + 1] if type(s).held is not Step.held
        ]  # asked at each call

    def process(self, messages: list[Message], edge: str, emit: Emit) -> None:
        for step in self.steps:
            step.begin()
        try:
            self._run(0, messages, emit)
        except BaseException:
            for step in self.steps:
                step.rollback()
            raise

    def _run(self, start: int, messages: list[Message], emit: Emit) -> None:
        """Messages through the steps from ``start`` on."""
        for i in range(start, len(self.steps)):
            if not messages:
                return
            messages = self._books(i, emit, partial(self.steps[i].process, messages))
        for message in messages:
            emit.send(message)

    def finish(self, emit: Emit) -> None:
        for i, step in enumerate(self.steps):
            self._run(i + 1, self._books(i, emit, step.finish), emit)

    def _books(self, i: int, emit: Emit, run: Callable[[Emit], list[Message]]) -> list[Message]:
        """Run step ``i`` and enter in the books what it did with the rows that were received."""
        if i <= self._gatherer:
            before = len(emit.sent)
            onward = run(emit)
            if self.absorbs and i < self._gatherer:
                emit.absorb(sum(m.rows for _, m in emit.sent[before:]))  # left by a port before they were gathered
            return onward
        own = Emit()
        onward = run(own)
        for port, message in own.sent:
            emit.send(message, port)
        for message, reason, detail in own.dead:
            emit.reject(message, reason, detail)
            emit.absorb(-message.rows)  # dead now, and absorbed when they were gathered: once is enough
        return onward

    def held(self) -> int:
        return sum([step.held() for step in self._holders])

    def snapshot(self) -> Any:
        states = [step.snapshot() for step in self.steps]
        return states if any(s is not None for s in states) else None

    def restore(self, state: Any) -> None:
        for step, own in zip(self.steps, state, strict=True):
            if own is not None:
                step.restore(own)


class GatheringPipeline(Pipeline):
    """Steps of which one gathers rows into other messages."""

    absorbs: ClassVar[bool] = True


def build(config: Config, context: Context) -> Operator:
    """The operator for these steps."""
    made = [kinds.module("step", entry.name).build(entry.options, context) for entry in config.steps]
    steps: list[Step] = []
    for family, some in groupby(
        made, lambda step: next((f for f in (RowStep, FrameStep) if isinstance(step, f)), None)
    ):
        together = list(some)
        steps.extend(
            [RowStage(together)] if family is RowStep else [FrameStage(together)] if family is FrameStep else together
        )
    return GatheringPipeline(steps) if any(s.absorbs for s in steps) else Pipeline(steps)
