"""Change, choose and reshape what was sensed, in steps.

``{preprocess: {steps: [{resize: [96, 96]}, {scale: 1/255}]}}``: each step is a kind of :mod:`nodes.steps`, run in the
order given. Reading steps that stand together work on one table of all messages of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Annotated, Any, ClassVar, cast, get_args

from pydantic import Field, GetJsonSchemaHandler, PlainSerializer, PlainValidator, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType

from nodes import kinds
from nodes.operator import Context, Emit, Flow, Operator
from nodes.options import Options
from nodes.steps._stack import FrameStage
from nodes.steps._step import FrameStep, Step, StepOptions
from nodes.steps._table import RowStage, RowStep
from schemas.errors import ConfigError, Problem, did_you_mean
from schemas.messages import Message

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class StepEntry:
    """One step of the list.

    :param inner: field that the shorthand stands for; it is not in what the user wrote, so not in paths either.
    """

    name: str
    options: StepOptions
    bare: bool
    inner: str | None

    def path(self, path: Path) -> Path:
        """Where ``path`` of the options stands in the entry as it was written."""
        if self.inner is not None and path[:1] == (self.inner,):
            path = path[1:]
        return path if self.bare else (self.name, *path)


def _entry(value: Any) -> StepEntry:
    """``"decode"``, ``{"resize": [96, 96]}`` or ``{"resize": {"size": [96, 96]}}`` → the step."""
    if isinstance(value, StepEntry):
        return value
    name: Any
    raw: Any
    bare = isinstance(value, str)
    if bare:
        name, raw = value, {}
    elif isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value)), str):
        name, raw = next(iter(value.items()))
    else:
        raise PydanticCustomError("step", "expected a step: its name, or one name with its options", {})
    try:
        config = cast("type[StepOptions]", kinds.module("step", name).Config)
    except ConfigError as error:
        unknown = PydanticCustomError("unknown_kind", "{why}", {"why": str(error)})
        raise _invalid([InitErrorDetails(type=unknown, loc=() if bare else (name,), input=name)]) from None
    fields = {} if raw is None else config.shorthand(raw)
    inner = None
    if isinstance(fields, dict) and fields is not raw and len(fields) == 1:
        inner = next((key for key, held in fields.items() if held is raw), None)
    frame = StepEntry(name, config.model_construct(), bare, inner)
    try:
        options = config.model_validate(fields)
    except ValidationError as error:
        known = [info.alias or key for key, info in config.model_fields.items()]
        raise _invalid([_moved(e, frame.path, known) for e in error.errors(include_url=False)]) from None
    return StepEntry(name, options, bare, inner)


def _moved(error: Any, path: Callable[[Path], Path], known: Iterable[str]) -> InitErrorDetails:
    """A problem of the options, as one of the entry."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden" and len(error["loc"]) == 1:
        key = str(error["loc"][0])
        why = {"why": f"unknown key {key!r}{did_you_mean(key, known)}"}
        return InitErrorDetails(
            type=PydanticCustomError("unknown_kind", "{why}", why), loc=path(error["loc"]), input=key
        )
    if kind not in _KNOWN:
        kind = PydanticCustomError(kind, "{reason}", {**context, "reason": error["msg"]})
    return InitErrorDetails(type=kind, loc=path(error["loc"]), input=error["input"], ctx=context)


_KNOWN = frozenset(get_args(ErrorType))


def _invalid(errors: list[InitErrorDetails]) -> ValidationError:
    return ValidationError.from_exception_data("step", errors)


class _Schema:
    """JSON Schema of an entry: a name, or one of the steps with its options."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        del core
        alternatives: list[JsonSchemaValue] = [{"enum": list(kinds.names("step"))}]
        for name, options in variants().items():
            full = handler.resolve_ref_schema(handler(options.__pydantic_core_schema__))
            bare = cast("type[StepOptions]", options).bare
            alternatives.append(
                {
                    "type": "object",
                    "properties": {name: full if bare is None else {"anyOf": [bare, full]}},
                    "required": [name],
                    "additionalProperties": False,
                }
            )
        return {"anyOf": alternatives}


Entry = Annotated[
    StepEntry,
    PlainValidator(_entry),
    PlainSerializer(lambda e: {e.name: e.options.model_dump()}),
    _Schema(),
]


def variants() -> dict[str, type[Options]]:
    """Every step with its options."""
    return {name: cast("type[Options]", kinds.module("step", name).Config) for name in kinds.names("step")}


class Config(Options):
    """Options of ``preprocess``."""

    steps: list[Entry] = Field(min_length=1, max_length=64, description="what is done, in order")

    def check(self, context: Context) -> None:
        for i, entry in enumerate(self.steps):
            with _at(i, entry):
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
            with _at(i, entry):
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


@contextmanager
def _at(i: int, entry: StepEntry) -> Iterator[None]:
    """Problems raised inside are those of step ``i``."""
    try:
        yield
    except ConfigError as error:
        problems = (Problem(("steps", i, *entry.path(p.path)), p.message, p.offset, p.on_key) for p in error.problems)
        raise ConfigError(*problems) from None


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
