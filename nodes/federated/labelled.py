"""From messages with known labels to examples: which numbers are the input, which is the label, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nodes.federated.examples import Example
from schemas.messages import Array, Column, Frame, Message, Readings, Scalar, Tensors


class UnlabelledError(ValueError):
    """There is no label."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """How examples are read.

    :param label: attribute of frames and tensors, column of readings.
    :param fields: columns of readings that are the input, in this order.
    :param tensor: which one is the input; None: there is only one.
    :param classes: name → number; None: labels are the numbers themselves.
    :param numbers: labels are numbers to be told (a regression), not classes.
    :param skip: rows and messages without a label are left out; otherwise they are refused.
    """

    label: str = "label"
    fields: Sequence[str] = ()
    tensor: str | None = None
    classes: Mapping[str, int] | None = None
    numbers: bool = False
    skip: bool = False

    def read(self, message: Message) -> list[Example]:
        """The examples in a message.

        :raises UnlabelledError: it has no label, and such are not left out.
        :raises ValueError: it cannot be learned from; says why.
        """
        body = message.body
        try:
            if isinstance(body, Readings):
                return self._rows(message, body)
            if isinstance(body, Frame):
                label = self._target(body.attributes.get(self.label))
                return [Example(message.id, message.time, self._frame(body), label)]
            if isinstance(body, Tensors):
                label = self._target(body.attributes.get(self.label))
                return [Example(message.id, message.time, self._tensor(body), label)]
        except UnlabelledError:
            if self.skip:
                return []
            raise
        raise ValueError(f"{message.type} is nothing to learn from")

    def _target(self, value: Scalar) -> int | float:
        """The label as it is learned."""
        if value is None or value == "" or value != value:
            raise UnlabelledError(f"it has no {self.label!r}")
        if self.numbers:
            try:
                number = float(value)
            except ValueError:
                raise ValueError(f"{self.label} is {value!r}, not a number") from None
            if not math.isfinite(number):
                raise ValueError(f"{self.label} is {value!r}")
            return number
        if self.classes is not None:
            name = _text(value)
            if name not in self.classes:
                raise ValueError(f"{self.label} is {name[:60]!r}, which is none of the classes")
            return self.classes[name]
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (number >= 0 and number.is_integer() and number < 2**31):
            raise ValueError(
                f"{self.label} is {value!r}; a class is a whole number from 0 on, or has a name in 'classes'"
            )
        return int(number)

    def _frame(self, frame: Frame) -> Array:
        data = frame.data
        if not isinstance(data, np.ndarray):
            raise ValueError(f"a frame of {frame.encoding}; decode it first (preprocess: decode)")
        return _checked(data)

    def _tensor(self, body: Tensors) -> Array:
        if self.tensor is not None:
            if self.tensor not in body.tensors:
                raise ValueError(f"it has no tensor {self.tensor!r}, but {', '.join(body.tensors)}")
            return _checked(body.tensors[self.tensor])
        if len(body.tensors) != 1:
            raise ValueError(f"it has the tensors {', '.join(body.tensors)}; say which in 'tensor'")
        return _checked(next(iter(body.tensors.values())))

    def _rows(self, message: Message, body: Readings) -> list[Example]:
        labels = self._column(body, self.label)
        values = labels if isinstance(labels, list) else labels.tolist()
        x = np.empty((body.n, len(self.fields)), np.float32)
        for i, name in enumerate(self.fields):
            column = self._column(body, name)
            if isinstance(column, list):
                raise ValueError(f"the column {name!r} has texts")
            x[:, i] = column
        out = []
        for row, value in enumerate(values):
            try:
                label = self._target(value)
            except UnlabelledError:
                if self.skip:
                    continue
                raise UnlabelledError(f"row {row} has no {self.label!r}") from None
            if not np.isfinite(x[row]).all():
                missing = [
                    name for name, value in zip(self.fields, x[row].tolist(), strict=True) if not math.isfinite(value)
                ]
                raise ValueError(f"row {row} has no number in {', '.join(missing)}")
            time = message.time if body.time is None else int(body.time[row])
            ident = message.id if body.n == 1 else f"{message.id}/{row}"
            out.append(Example(ident, time, x[row], label))
        return out

    def _column(self, body: Readings, name: str) -> Column:
        if name not in body.columns:
            if name == self.label:
                raise UnlabelledError(f"it has no column {name!r}")
            raise ValueError(f"it has no column {name!r}")
        return body.columns[name]


def _text(value: Scalar) -> str:
    """A class as its name is written."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _checked(array: Array) -> Array:
    if array.dtype.kind not in "biuf" or not array.size:
        raise ValueError(f"{array.dtype} {list(array.shape)} is nothing to learn from")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("it has numbers that are infinite or none")
    return array
