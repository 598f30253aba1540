"""Messages as a model's inputs: which items a message holds, whether they fit, and arrays of a whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np

from nodes import stacks
from nodes.backends._backend import Scaling, Signature, Spec, quantise
from schemas import rows
from schemas.messages import Array, Column, Frame, Message, Readings, Scalar, Tensors


class UnfitError(Exception):
    """A message that the model cannot take.

    :param reason: short stable word for the ledger.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Item(msgspec.Struct, gc=False):
    """One thing to infer on: a message, or one row of it.

    :param row: row of readings; None: the whole message.
    :param size: (width, height) of a frame in pixels; (1, 1) where there is none.
    :param inputs: by the model's input names, as the message has them, in the spec's shape.
    """

    message: Message
    row: int | None
    size: tuple[int, int]
    attributes: dict[str, Scalar]
    inputs: dict[str, Array]

    def alone(self) -> Message:
        """The message, or one like it with only this row: what is dead-lettered when the item cannot be answered."""
        body = self.message.body
        if self.row is None or not isinstance(body, Readings) or body.n == 1:
            return self.message
        index = np.array([self.row])
        return msgspec.structs.replace(
            self.message,
            body=Readings(
                n=1,
                columns={name: rows.take(column, index) for name, column in body.columns.items()},
                time=None if body.time is None else body.time[index],
                source=None if body.source is None else [body.source[self.row]],
            ),
        )


class Gatherer:
    """Takes messages apart for one model.

    :param fields: columns of readings that make the feature vector, in the model's order.
    :param keep: columns of readings that become attributes of the predictions.
    :param scaling: what unsigned whole numbers stand for; None: they are refused where the model takes real ones.
    """

    def __init__(
        self, signature: Signature, fields: Sequence[str], keep: Sequence[str], scaling: Scaling | None = None
    ) -> None:
        self._inputs = signature.inputs
        self._scaling = scaling
        self._at_once = {spec.name: _bytes(spec, scaling) for spec in signature.inputs}
        self._fields = tuple(fields)
        self._keep = tuple(keep)

    def alike(self, messages: Sequence[Message]) -> tuple[list[Item], Array] | None:
        """The items of frames that differ in values only, and their arrays as one [n, *shape]; None: they are not such.

        :raises UnfitError: none of them fits the model.
        """
        first = messages[0].body if messages else None
        if not isinstance(first, Frame) or not isinstance(first.data, np.ndarray):
            return None
        shape, dtype, layout = first.data.shape, first.data.dtype, first.layout
        items, parts = [], []
        size = self._frame(messages[0], first).size
        for message in messages:
            body = message.body
            if not isinstance(body, Frame) or not isinstance(data := body.data, np.ndarray):
                return None
            if data.shape != shape or data.dtype != dtype or body.layout != layout:
                return None
            items.append(Item(message, None, size, body.attributes, {}))
            parts.append(data)
        whole = stacks.stacked(parts)
        return items, whole.reshape(len(parts), *self._inputs[0].shape)

    def stacked(self, items: Sequence[Item], spec: Spec) -> tuple[Array, Array]:
        """One input of all items, [n, *shape], of the spec's dtype: real numbers quantised where the model is.

        :returns: it, and which items have a NaN in it, bool [n] (what stands there for them means nothing).
        """
        parts = [item.inputs[spec.name] for item in items]
        if len({(part.dtype, part.shape) for part in parts}) == 1:
            return self.fit(stacks.stacked(parts), spec)
        # float and quantised messages in one batch
        single = [self.fit(part[None], spec) for part in parts]
        return np.concatenate([table for table, _ in single]), np.concatenate([bad for _, bad in single])

    def fit(self, table: Array, spec: Spec, *, later: bool = False) -> tuple[Array, Array]:
        """:meth:`stacked` for what is one array [n, *shape] already.

        :param later: what a float input is scaled from is left to :meth:`~nodes.backends._backend.Backend.infer`.
        """
        if table.dtype.kind == "u" and self._scaling is not None:
            if later and spec.dtype.kind == "f":
                return table, np.zeros(len(table), np.bool_)
            at_once = self._at_once[spec.name] if table.dtype == np.uint8 else None
            table = at_once(table) if at_once is not None else self._scaling.real(table)
            bad = np.zeros(len(table), np.bool_)  # whole numbers lack none
            return (table if table.dtype == spec.dtype else _stored(table, spec)), bad
        bad = missing(table)
        return (table if table.dtype == spec.dtype else _stored(table, spec)), bad

    def items(self, message: Message) -> Iterator[Item]:
        """The items of ``message``.

        :raises UnfitError: it does not fit the model; none of it is inferred on.
        """
        body = message.body
        if isinstance(body, Frame):
            yield self._frame(message, body)
        elif isinstance(body, Readings):
            yield from self._readings(message, body)
        elif isinstance(body, Tensors):
            yield self._tensors(message, body)
        else:
            raise UnfitError("bad-type", f"infer takes frames, tensors and readings, not {message.type}")

    def _single(self, what: str) -> Spec:
        if len(self._inputs) != 1:
            names = ", ".join(spec.name for spec in self._inputs)
            raise UnfitError(
                "bad-shape", f"the model has {len(self._inputs)} inputs ({names}); {what} fill one: send tensors"
            )
        return self._inputs[0]

    def _frame(self, message: Message, body: Frame) -> Item:
        spec = self._single("frames")
        if not isinstance(body.data, np.ndarray):
            raise UnfitError(
                "bad-encoding", f"a frame of {body.encoding}; the model takes raw ones: decode it in preprocess"
            )
        data = self._fitted(body.data, spec, f"a frame ({body.layout})")
        shape, layout = body.data.shape, body.layout
        size = (1, 1)
        if "H" in layout and "W" in layout and len(shape) == len(layout):
            size = (shape[layout.index("W")], shape[layout.index("H")])
        return Item(message, None, size, body.attributes, {spec.name: data})

    def _fitted(self, data: Array, spec: Spec, what: str) -> Array:
        """As :func:`fitted`; what is to be scaled counts as real numbers."""
        if self._scaling is not None and data.dtype.kind == "u" and spec.real:
            return _shaped(data, spec, what)
        return fitted(data, spec, what)

    def _tensors(self, message: Message, body: Tensors) -> Item:
        given = body.tensors
        if len(self._inputs) == len(given) == 1:  # one needs no name
            inputs = {self._inputs[0].name: next(iter(given.values()))}
        else:
            missing = [spec.name for spec in self._inputs if spec.name not in given]
            if missing:
                raise UnfitError("bad-shape", f"no tensor {missing[0]!r} among {', '.join(given) or 'none'}")
            inputs = {spec.name: given[spec.name] for spec in self._inputs}
        data = {spec.name: self._fitted(inputs[spec.name], spec, f"tensor {spec.name!r}") for spec in self._inputs}
        return Item(message, None, (1, 1), body.attributes, data)

    def _readings(self, message: Message, body: Readings) -> Iterator[Item]:
        spec = self._single("readings")
        columns = []
        for name in self._fields:
            column = body.columns.get(name)
            if column is None:
                raise UnfitError("missing-field", f"readings without the field {name!r}")
            if isinstance(column, list):
                raise UnfitError("bad-shape", f"field {name!r} is text; a model takes numbers")
            columns.append(column.astype(np.float32))
        table = np.stack(columns, axis=1) if columns else np.zeros((body.n, 0), np.float32)
        if table.shape[1] != int(np.prod(spec.shape)):
            raise UnfitError("bad-shape", f"{table.shape[1]} fields for the model's input {spec}")
        table = table.reshape(body.n, *spec.shape)
        kept = {name: body.columns[name] for name in self._keep if name in body.columns}
        for i in range(body.n):
            attributes = {name: _scalar(column, i) for name, column in kept.items()}
            yield Item(message, i, (1, 1), attributes, {spec.name: table[i]})


def _scalar(column: Column, row: int) -> Scalar:
    if isinstance(column, list):
        return column[row]
    value: Scalar = column[row].item()
    return value


def fitted(data: Array, spec: Spec, what: str) -> Array:
    """``data`` in the shape of ``spec``: axes of length 1 may be missing or in excess, everything else must be equal.

    The type must be the input's own. Real numbers may be of any width for float inputs, and are also taken by quantised
    ones; whole numbers are never taken for real ones, as a forgotten ``scale`` step would go unseen.

    :raises UnfitError: it does not fit.
    """
    data = _shaped(data, spec, what)
    if data.dtype == spec.dtype or (data.dtype.kind == "f" and spec.real):
        return data
    expected = spec.dtype.name if spec.quantisation is None else f"{spec.dtype.name} or floats"
    hint = "; scale it in preprocess" if spec.real else ""
    raise UnfitError("bad-dtype", f"{what} of {data.dtype.name}; the model takes {expected}{hint}")


def _shaped(data: Array, spec: Spec, what: str) -> Array:
    if data.shape == spec.shape:
        return data
    same = [n for n in data.shape if n != 1] == [n for n in spec.shape if n != 1]
    if not same and not (spec.flat and data.size == math.prod(spec.shape)):
        raise UnfitError("bad-shape", f"{what} of shape {list(data.shape)}; the model takes {list(spec.shape)}")
    return data.reshape(spec.shape)


def _bytes(spec: Spec, scaling: Scaling | None) -> Callable[[Array], Array] | None:
    """How a camera's bytes become what a quantised input holds, if in one go: there are 256 of them."""
    if scaling is None or spec.quantisation is None:
        return None
    known = quantise(scaling.real(np.arange(256, dtype=np.uint8)), spec)
    if known.dtype == np.int8 and bool((known == np.arange(-128, 128)).all()):  # the usual: its highest bit is turned
        return lambda table: (np.ascontiguousarray(table) ^ np.uint8(128)).view(np.int8)
    return lambda table: known.take(table)


def _stored(values: Array, spec: Spec) -> Array:
    if spec.quantisation is None or values.dtype.kind != "f":
        return values.astype(spec.dtype)
    return quantise(np.nan_to_num(values) if np.isnan(values.sum()) else values, spec)


def missing(values: Array) -> Array:
    """Which items of [n, *shape] have a NaN, bool [n]. Infinities are numbers here, as for a model."""
    # The sum is NaN if one is: one pass, nothing allocated. Opposite infinities make it NaN too, so look again.
    if values.dtype.kind != "f" or not np.isnan(values.sum()):
        return np.zeros(len(values), np.bool_)
    return np.asarray(np.isnan(values.reshape(len(values), -1)).any(axis=1))
