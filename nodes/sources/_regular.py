"""Foreign records that are all as expected, to columns without looking at each: the short way of the ``mqtt`` source.

Where anything is unusual (a payload that cannot be read, a value of another type, a field that is new), there is no answer,
and the caller goes the long way, which says what is wrong with which record. Both give the same columns.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import numpy as np

from broker.bus import Delivery
from nodes.sources import _times
from nodes.sources._mapping import Types, steps_of, topic_level
from schemas.messages import Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nodes.sources.mqtt import Config

_TOPICS = 65_536
"""Topics whose levels are remembered."""
_NONE = type(None)

Values = Callable[[Sequence[Any], Sequence[Delivery]], list[Any]]
"""Given decoded records and their deliveries, a value of each."""
Rows: TypeAlias = "tuple[int, dict[str, Column], list[str] | None, NDArray[np.int64] | None]"
"""Number of rows, columns, device of each row, event time of each row (None: the caller's own)."""


class Irregular(Exception):  # noqa: N818 - no error: the long way is to be gone
    """Something is unusual."""


class Regular:
    """Decodes only the fields that are asked for, and takes a column at a time.

    :param types: shared with the long way: a field's type stays once it was seen.
    :raises Irregular: what is asked for has no short way.
    """

    def __init__(self, config: Config, types: Types) -> None:
        if config.format not in {"json", "msgpack"} or config.rows is not None:
            raise Irregular
        self._types = types
        self._unit = config.time_unit
        self._levels: dict[str, list[str]] = {}
        wanted = dict(config.fields or {})
        named = config.device is not None and config.device.startswith(("$", "topic["))
        device = config.device if named else None
        tree: dict[str, Any] = {}
        for path in (*wanted.values(), device, config.time):
            if path is not None and topic_level(path) is None:
                _plant(tree, steps_of(path))
        kind = msgspec.json if config.format == "json" else msgspec.msgpack
        if config.fields is None:
            if any(isinstance(below, dict) for below in tree.values()):
                raise Irregular
            self._read = kind.Decoder().decode
            self._fields: dict[str, Values] | None = None
        else:
            self._read = kind.Decoder(_struct(tree)).decode
            self._fields = {name: self._values(path, tree) for name, path in wanted.items()}
        whole = None if config.fields is None else tree
        self._device = None if device is None else self._values(device, whole)
        self._time = None if config.time is None else self._values(config.time, whole)

    def rows(self, deliveries: Sequence[Delivery]) -> Rows:
        """All payloads as rows.

        :raises Irregular: something is unusual; nothing was remembered.
        """
        read = self._read
        try:
            records = [read(d.payload) for d in deliveries]
            fields = self._mapped(records, deliveries) if self._fields is not None else self._found(records)
            devices = None if self._device is None else _names(self._device(records, deliveries))
            times = None if self._time is None else self._moments(self._time(records, deliveries))
        except (msgspec.DecodeError, ValueError, RecursionError, AttributeError, LookupError, TypeError, OverflowError):
            raise Irregular from None
        return len(records), fields, devices, times

    def _mapped(self, records: list[Any], deliveries: Sequence[Delivery]) -> dict[str, Column]:
        columns: dict[str, Column] = {}
        filled = False
        for name, values in (self._fields or {}).items():
            columns[name], full = self._column(name, values(records, deliveries))
            filled = filled or full
        if not filled:  # a record with none of the fields may be among them
            raise Irregular
        return columns

    def _found(self, records: list[Any]) -> dict[str, Column]:
        """Every single value by its own name, where all records have the same names."""
        if set(map(type, records)) != {dict}:
            raise Irregular
        names = list(records[0])
        if not names or set(map(len, records)) != {len(names)}:
            raise Irregular
        columns = {}
        for name in names:
            columns[name], full = self._column(name, list(map(operator.itemgetter(name), records)))
            if not full:
                raise Irregular
        return columns

    def _column(self, name: str, values: list[Any]) -> tuple[Column, bool]:
        """A column, and whether it has a value for every row."""
        found = set(map(type, values))
        kind = self._types.known(name)
        full = _NONE not in found
        if kind == "float" and found <= {float, int, _NONE}:
            return np.array(values, np.float64), full
        if not full and found == {_NONE} and kind != "text":
            return np.full(len(values), np.nan), False
        if kind == "int" and found == {int}:
            return np.array(values, np.int64), True
        if kind == "text" and found <= {str, _NONE}:
            return values, full
        if kind == "bool" and found == {bool}:
            return np.array(values, np.bool_), True
        raise Irregular

    def _moments(self, values: list[Any]) -> NDArray[np.int64]:
        found = set(map(type, values))
        if found == {str}:
            if self._unit not in {None, "iso"} or not _times.all_plain(values):
                raise Irregular
            return _times.from_texts(values, "iso")
        if found not in ({int}, {float}) or self._unit == "iso":
            raise Irregular
        numbers: NDArray[np.int64] | NDArray[np.float64]
        numbers = np.array(values, np.int64) if found == {int} else np.array(values, np.float64)
        unit = self._unit or _times.unit_of(numbers)
        if unit is None:
            raise Irregular
        return _times.from_numbers(numbers, unit)

    # what stands where

    def _values(self, path: str, tree: dict[str, Any] | None) -> Values:
        """How to get a value of each record; ``tree`` None: records are plain maps."""
        if (level := topic_level(path)) is not None:
            return lambda records, deliveries: self._of_topic(level, deliveries)
        steps = [str(step) for step in steps_of(path)]
        if tree is None:
            pick: Callable[[Any], Any] = operator.itemgetter(steps[0])
        else:
            names = []
            below: Any = tree
            for step in steps:
                names.append(f"f{list(below).index(step)}")
                below = below[step]
            pick = operator.attrgetter(".".join(names))
        return lambda records, deliveries: list(map(pick, records))

    def _of_topic(self, level: int, deliveries: Sequence[Delivery]) -> list[Any]:
        known = self._levels
        try:
            return [known[d.topic][level] for d in deliveries]
        except KeyError:
            if len(known) + len(deliveries) > _TOPICS:
                known.clear()
            known.update((d.topic, d.topic.split("/")) for d in deliveries)
        return [known[d.topic][level] for d in deliveries]


def _plant(tree: dict[str, Any], steps: Sequence[str | int]) -> None:
    """Add a path to a tree of maps, whose leaves are None.

    :raises Irregular: the record itself, an item of a list, or a path within another.
    """
    if not steps or any(isinstance(step, int) for step in steps):
        raise Irregular
    *outer, last = map(str, steps)
    for step in outer:
        below = tree.setdefault(step, {})
        if below is None:
            raise Irregular
        tree = below
    if tree.setdefault(last, None) is not None:
        raise Irregular


def _struct(tree: dict[str, Any]) -> type[msgspec.Struct]:
    """A type with these fields alone: what else a record has is passed over by the decoder.

    :raises Irregular: a name that a struct cannot have.
    """
    fields = []
    for i, below in enumerate(tree.values()):
        kind: Any = Any if below is None else _struct(below) | None
        fields.append((f"f{i}", kind, None))
    names = {f"f{i}": key for i, key in enumerate(tree)}
    try:
        return msgspec.defstruct("Record", fields, rename=names, gc=False)
    except (TypeError, ValueError):
        raise Irregular from None


def _names(values: list[Any]) -> list[str]:
    found = set(map(type, values))
    if found == {int}:
        return list(map(str, values))
    if found != {str} or "" in values:
        raise Irregular
    return values
