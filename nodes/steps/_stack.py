"""Steps on many frames at once: frames alike that came together go through the steps as one array.

What each step answers for a frame is the same, to the last bit, as if the frame were alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from nodes.operator import Emit
from nodes.stacks import stacked
from nodes.steps._step import FrameStep, Step
from schemas.messages import Array, Frame, Message

_SMALL = 128 * 1024
"""Bytes of a frame up to which a call costs something beside its pixels."""
_MOST = 1024 * 1024
"""Bytes of frames that go together: they and their answers stay in the processor's cache, and one that somebody keeps does
not keep many others in memory."""


class FrameStage(Step):
    """Frame steps one after the other."""

    def __init__(self, steps: Sequence[FrameStep]) -> None:
        self.steps = list(steps)
        self._together = type(steps[0]).stack is not FrameStep.stack

    def process(self, messages: list[Message], emit: Emit) -> list[Message]:
        if not self._together:
            return self._each(0, messages, emit)
        out: list[Message] = []
        for run in _runs(messages):
            out += self._stack(run, emit) if len(run) > 1 else self._each(0, run, emit)
        return out

    def _each(self, start: int, messages: list[Message], emit: Emit) -> list[Message]:
        """Frame by frame, through the steps from ``start`` on."""
        for step in self.steps[start:]:
            messages = step.process(messages, emit)
        return messages

    def _stack(self, messages: list[Message], emit: Emit) -> list[Message]:
        frames = [message.body for message in messages if isinstance(message.body, Frame)]
        like = frames[0]
        array = stacked([frame.data for frame in frames if isinstance(frame.data, np.ndarray)])
        for i, step in enumerate(self.steps):
            made = step.stack(array, like)
            if made is None:
                return self._each(i, messages if i == 0 else _apart(messages, frames, array, like.layout), emit)
            array, layout = made
            like = msgspec.structs.replace(like, data=array[0], layout=layout)
        return _apart(messages, frames, array, like.layout)


def _runs(messages: list[Message]) -> Iterator[list[Message]]:
    """Neighbours that are small raw frames of one kind, not too many; everything else alone."""
    run: list[Message] = []
    kind: object = None
    most = 0
    for message in messages:
        body = message.body
        its: object = None
        if isinstance(body, Frame) and isinstance(body.data, np.ndarray) and 0 < body.data.nbytes <= _SMALL:
            its = (body.data.shape, body.data.dtype, body.layout)
            if its != kind:
                most = _MOST // body.data.nbytes
        if run and (its is None or its != kind or len(run) >= most):
            yield run
            run = []
        run.append(message)
        kind = its
    if run:
        yield run


def _apart(messages: list[Message], frames: list[Frame], array: Array, layout: str) -> list[Message]:
    """A message for each, with its part of the array."""
    return [
        message.derive(Frame(data=data, layout=layout, rate=frame.rate, attributes=frame.attributes))
        for message, frame, data in zip(messages, frames, array, strict=True)
    ]
