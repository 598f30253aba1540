"""What a step of ``preprocess`` is. A step is one file beside this one; its name is the kind's name.

Such a module has, beside the docstring, ``Config(StepOptions)`` and ``def build(config: Config, context: Context) -> Step |
RowStep`` (see :mod:`nodes.steps._table` for the latter). Steps do no I/O and know no node.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from nodes.operator import Context, Emit, Flow
from nodes.options import Options
from schemas.errors import ConfigError, PenstockError
from schemas.messages import Array, Frame, Message
from schemas.rows import ROW_TYPES

READINGS = frozenset({"readings/1"})
FRAMES = frozenset({"frame/1"})
ROWS = ROW_TYPES
ANY = ROW_TYPES | {"frame/1", "tensors/1", "update/1"}

ROW_NAMES = frozenset({"time", "source"})
"""What every row has beside its fields; expressions read them by these names where no field has the name."""


class RefusedError(PenstockError):
    """One message cannot pass a step: it is rejected with ``reason``, the others go on.

    :param reason: short stable word for the ledger, e.g. ``wrong-shape``.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class StepOptions(Options):
    """Config of one step."""

    takes: ClassVar[frozenset[str]]
    """Types of body that may come in."""

    bare: ClassVar[dict[str, Any] | None] = None
    """JSON Schema of what :meth:`~nodes.options.Options.shorthand` takes beside the map of fields."""

    def accepts(self) -> frozenset[str] | None:
        return self.takes

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        out: dict[str, Flow] = {}
        for flow in inputs:
            if flow.type not in self.takes:
                raise ConfigError(f"takes {' or '.join(sorted(self.takes))}, and {flow.type} comes in")
            out["out"] = self.flow(flow)
        return out

    def flow(self, flow: Flow) -> Flow:
        """What goes on to the next step, given what comes in.

        :raises ConfigError: the fields do not fit; paths relative to this config.
        """
        return flow


class Step(ABC):
    """Messages in, messages out; the next step gets what :meth:`process` returns."""

    absorbs: ClassVar[bool] = False
    """True: rows are gathered into other messages; the step calls ``emit.absorb``. False: rows pass."""

    @abstractmethod
    def process(self, messages: list[Message], emit: Emit) -> list[Message]:
        """The messages that go on, in order. All others are named to ``emit`` (filter, drop, reject, absorb, send).

        The answer must not depend on how a stream was cut into calls.
        """

    def finish(self, emit: Emit) -> list[Message]:
        """The input has ended: what is still to be sent."""
        return []

    def held(self) -> int:
        """Rows taken in whose effect is not complete."""
        return 0

    def snapshot(self) -> Any:
        """State as plain msgpack types, or None."""
        return None

    def restore(self, state: Any) -> None:
        """Continue from a :meth:`snapshot`."""

    def begin(self) -> None:
        """A call begins; :meth:`rollback` leads back to here."""

    def rollback(self) -> None:
        """The call failed: forget what it changed."""


class FrameStep(Step):
    """A step that looks at one frame at a time."""

    def process(self, messages: list[Message], emit: Emit) -> list[Message]:
        out: list[Message] = []
        for message in messages:
            if not isinstance(message.body, Frame):
                emit.reject(message, "wrong-type", f"expected frame/1, got {message.type}")
                continue
            try:
                out.append(message.derive(self.frame(message.body)))
            except RefusedError as error:
                emit.reject(message, error.reason, str(error))
        return out

    @abstractmethod
    def frame(self, frame: Frame) -> Frame:
        """The frame that goes on.

        :raises RefusedError: this one cannot.
        """

    def stack(self, images: Array, like: Frame) -> tuple[Array, str] | None:
        """:meth:`frame` for many raw frames at once, where that gives the same to the last bit.

        :param images: [n, *shape].
        :param like: one of them; the others differ in values and attributes only.
        :returns: [n, *shape'] and its layout; None: one by one, please.
        """
        return None
