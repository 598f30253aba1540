"""Readings from topics that other devices publish: JSON, msgpack, plain numbers or texts, at any broker.

All that has arrived becomes one message of many rows. At QoS 1 the broker is told that we have it only after the next
nodes have it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, Literal

import msgspec
import numpy as np
from pydantic import Field

from broker.bus import Bus, Delivery, Subscription
from nodes.operator import Chunk, Context, Draft, Flow, Source
from nodes.options import Options
from nodes.sources import _times
from nodes.sources._cells import CellType
from nodes.sources._mapping import Getter, Types, flatten, getter, is_path
from nodes.sources._regular import Irregular, Regular
from schemas import codec
from schemas.errors import ClosedError, ConfigError, Problem, did_you_mean
from schemas.messages import Column, Message, Readings
from schemas.rows import take
from schemas.units import Duration

_KEPT = 64 * 1024  # bytes of an undecodable payload that go to the dead letters
_Dead = tuple[bytes, str, str, str]


class Config(Options):
    """Options of the ``mqtt`` source."""

    topics: list[str] = Field(min_length=1, description="topic filters, e.g. zigbee2mqtt/+")
    broker: str | None = Field(
        None, description="name of a broker of the topology, or its URL; the host's own if left out"
    )
    format: Literal["json", "msgpack", "number", "text"] = Field("json", description="what the payloads are")
    field: str = Field("value", min_length=1, description="field of a payload that is a single value")
    fields: dict[str, str] | None = Field(
        None, description="field → path ($.a.b[0], topic[1]); every single value by its own name if left out"
    )
    types: dict[str, CellType] = Field({}, description="types of fields: float, int, bool, text; or as first seen")
    rows: str | None = Field(
        None, description="path of a list in the payload each item of which is a row; $ is the payload"
    )
    device: str | None = Field(
        None,
        description="what they speak of: a name, a level of the topic (topic[1]) or a path; the node's name if left out",
    )
    split: bool = Field(False, description="one message for each device")
    time: str | None = Field(None, description="path of the event time; the time of arrival if left out")
    time_unit: Literal["s", "ms", "us", "ns", "iso"] | None = Field(
        None, description="of the event time; by its size if left out"
    )
    qos: Literal[0, 1] = Field(1, description="of the subscription; 1: nothing is acknowledged before it is safe")
    session: Duration = Field(
        3600 * 10**9, description="how long the broker keeps for us what comes while we are away (qos 1); 0: not at all"
    )
    retained: bool = Field(False, description="also take what the broker had retained before")
    group: str | None = Field(None, description="name of a shared subscription: each message goes to one member")
    capacity: int = Field(1024, ge=1, le=65535, description="most messages that wait to be taken, or to be safe")

    def check(self, context: Context) -> None:
        problems = []
        for i, text in enumerate(self.topics):
            if why := _filter_problem(text):
                problems.append(Problem(("topics", i), why))
        paths: dict[tuple[str | int, ...], str | None] = {("rows",): self.rows, ("time",): self.time}
        paths |= {("fields", name): path for name, path in (self.fields or {}).items()}
        if self.device is not None and is_path(self.device):
            paths["device",] = self.device
        for place, path in paths.items():
            try:
                if path is not None:
                    getter(path)
            except ValueError as error:
                problems.append(Problem(place, str(error)))
        if self.format in ("number", "text"):
            given = [key for key in ("rows", "time", "fields") if getattr(self, key) is not None]
            problems += [Problem((key,), f"a payload of format {self.format} has no parts") for key in given]
        if self.broker is not None and "://" not in self.broker and self.broker not in context.brokers:
            hint = did_you_mean(self.broker, context.brokers)
            problems.append(Problem(("broker",), f"unknown broker {self.broker!r}{hint}"))
        if problems:
            raise ConfigError(*problems)

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        del inputs, context
        if self.format in ("number", "text"):
            return {"out": Flow("readings/1", frozenset({self.field}))}
        return {"out": Flow("readings/1", None if self.fields is None else frozenset(self.fields))}

    def accepts(self) -> frozenset[str]:
        return frozenset()


def _filter_problem(text: str) -> str | None:
    """What is wrong with a topic filter (MQTT 5, 4.7), or None."""
    levels = text.split("/")
    if not text or "\0" in text or len(text.encode("utf-8", "replace")) > 65535:
        return "expected a topic filter"
    if any("#" in level and (level != "#" or i < len(levels) - 1) for i, level in enumerate(levels)):
        return "'#' stands alone and last"
    if any("+" in level and level != "+" for level in levels):
        return "'+' stands alone in its level"
    return "name the group in 'group'" if text.startswith("$share/") else None


def build(config: Config, context: Context) -> Source:
    """An :class:`MqttSource`."""
    return MqttSource(config, context)


class MqttSource(Source):
    """Takes all that has arrived at once. Positions are numbers of chunks."""

    live = True

    def __init__(self, config: Config, context: Context) -> None:
        self._config = config
        self._context = context
        self.awaits = bool(config.qos)
        self._decoder = Decoder(config, context.node)
        self._bus: Bus | None = None
        self._subscription: Subscription | None = None
        self._unsettled: OrderedDict[int, list[Delivery]] = OrderedDict()

    async def open(self, position: Any) -> str:
        """:raises BusError: the broker cannot be reached or refuses us."""
        del position
        config, context = self._config, self._context
        keep = min(config.session // 10**9, 2**32 - 2) if config.qos else 0
        bus = self._bus = context.bus(config.broker, "source", session_expiry=keep)
        self._unsettled.clear()
        try:
            await bus.open()
            self._subscription = await bus.subscribe(
                config.topics, qos=config.qos, capacity=config.capacity, group=config.group, retained=config.retained
            )
        except BaseException:
            await self.close()
            raise
        return ""

    async def chunks(self) -> AsyncIterator[Chunk]:
        subscription = self._subscription
        if subscription is None:
            return
        number, dropped = 0, 0
        encoded = self._bus is not None and self._bus.encoded
        while True:
            try:
                deliveries = await subscription.receive()
            except ClosedError:
                return
            number += 1
            if not encoded:
                for delivery in deliveries:
                    if isinstance(delivery.payload, Message):  # a node of ours on the in-process bus
                        delivery.payload = codec.encode(delivery.payload)
            drafts, dead = self._decoder.decode(deliveries, time.time_ns())
            self._unsettled[number] = deliveries
            lost, dropped = subscription.dropped - dropped, subscription.dropped
            yield Chunk(drafts, number, dead, {"queue-full": lost} if lost else {})

    async def settled(self, position: Any) -> None:
        """Acknowledge every chunk up to this one."""
        while self._unsettled and next(iter(self._unsettled)) <= position:
            _, deliveries = self._unsettled.popitem(last=False)
            if self._subscription is not None:
                self._subscription.acknowledge(deliveries)

    async def close(self) -> None:
        self._subscription = None
        if self._bus is not None:
            await self._bus.close()
            self._bus = None


class Decoder:
    """Deliveries to readings; what cannot be read goes to the dead letters with its topic."""

    def __init__(self, config: Config, node: str) -> None:
        self._config = config
        self._types = Types(config.types)
        self._fields = None if config.fields is None else {name: getter(path) for name, path in config.fields.items()}
        self._rows = None if config.rows is None else getter(config.rows)
        self._time = None if config.time is None else getter(config.time)
        named = config.device is not None and is_path(config.device)
        self._device_of: Getter | None = getter(config.device) if named and config.device else None
        self._device = node if named or config.device is None else config.device
        self._read = {
            "json": msgspec.json.Decoder().decode,
            "msgpack": msgspec.msgpack.Decoder().decode,
            "number": _number,
            "text": _text,
        }[config.format]
        self.regular: Regular | None = None
        with suppress(Irregular):
            self.regular = Regular(config, self._types)

    def decode(self, deliveries: Sequence[Delivery], now: int) -> tuple[list[Draft], list[_Dead]]:
        """One message (with ``split`` one a device) of all rows, oldest first.

        :param now: time of arrival, ns since the epoch.
        """
        if self.regular is not None and deliveries:
            with suppress(Irregular):
                return self._drafts(*self.regular.rows(deliveries), now), []
        dead: list[_Dead] = []
        found, of = self._parsed(deliveries, dead)
        levels = [d.topic.split("/") for d in deliveries]
        records: list[Any] = []
        where: list[int] = []
        if self._rows is None:
            records, where = found, of
        else:
            for value, i in zip(found, of, strict=True):
                rows = self._rows(value, levels[i])
                if isinstance(rows, list):
                    records += rows
                    where += [i] * len(rows)
                else:
                    dead.append(_letter(deliveries[i], "bad-field", f"there is no list at {self._config.rows}"))
        if not records:
            return [], dead
        bad: dict[int, tuple[str, str]] = {}
        columns = self._columns(records, [levels[i] for i in where], bad)
        devices = self._devices(records, [levels[i] for i in where], bad)
        times = self._times(records, [levels[i] for i in where], bad, now)
        for i, (reason, why) in sorted(bad.items()):
            dead.append(_letter(deliveries[where[i]], reason, why))
        if bad:
            keep = np.array([i for i in range(len(records)) if i not in bad], np.int64)
            if not len(keep):
                return [], dead
            columns = {name: take(column, keep) for name, column in columns.items()}
            devices = None if devices is None else [devices[i] for i in keep.tolist()]
            times = None if times is None else times[keep]
        return self._drafts(len(records) - len(bad), columns, devices, times, now), dead

    def _parsed(self, deliveries: Sequence[Delivery], dead: list[_Dead]) -> tuple[list[Any], list[int]]:
        """Decoded payloads, and which delivery each is of.

        Each is decoded by itself: joining them to one JSON array saves 3 % and lets broken payloads complete each other.
        """
        read = self._read
        try:
            return [read(d.payload) for d in deliveries], list(range(len(deliveries)))
        except (msgspec.DecodeError, ValueError, RecursionError):
            pass
        out, of = [], []
        for i, delivery in enumerate(deliveries):
            try:
                out.append(read(delivery.payload))
                of.append(i)
            except (msgspec.DecodeError, ValueError, RecursionError) as error:
                dead.append(_letter(delivery, f"not-{self._config.format}", str(error)[:200]))
        return out, of

    def _columns(
        self, records: list[Any], levels: list[list[str]], bad: dict[int, tuple[str, str]]
    ) -> dict[str, Column]:
        columns: dict[str, list[Any]]
        if self._fields is None:
            flat: list[dict[str, Any]] = []
            for i, record in enumerate(records):
                try:
                    single = isinstance(record, (bool, int, float, str))
                    flat.append({self._config.field: record} if single else flatten(record))
                    if not flat[-1]:
                        bad[i] = ("bad-field", "no single value in it")
                except (ValueError, AttributeError) as error:
                    bad[i] = (
                        "bad-field",
                        str(error) if isinstance(error, ValueError) else "neither a map nor a single value",
                    )
                    flat.append({})
            names = dict.fromkeys(name for record in flat for name in record)
            columns = {name: [record.get(name) for record in flat] for name in names}
        else:
            columns = {
                name: [get(r, t) for r, t in zip(records, levels, strict=True)] for name, get in self._fields.items()
            }
            for i, values in enumerate(zip(*columns.values(), strict=True)):
                if all(v is None for v in values):
                    bad[i] = ("bad-field", "none of the fields is there")
        out: dict[str, Column] = {}
        for name, cells in columns.items():
            try:
                out[name], faults = self._types.column(name, cells)
            except ValueError as error:
                faults = {i: str(error) for i, v in enumerate(cells) if v is not None}
            for i, why in faults.items():
                bad.setdefault(i, ("bad-field", why))
        return out

    def _devices(
        self, records: list[Any], levels: list[list[str]], bad: dict[int, tuple[str, str]]
    ) -> list[str] | None:
        get = self._device_of
        if get is None:
            return None
        out = []
        for i, (record, level) in enumerate(zip(records, levels, strict=True)):
            value = get(record, level)
            if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
                bad.setdefault(i, ("bad-device", f"no device at {self._config.device}"))
                value = self._device
            out.append(str(value))
        return out

    def _times(
        self, records: list[Any], levels: list[list[str]], bad: dict[int, tuple[str, str]], now: int
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
        get = self._time
        if get is None:
            return None
        out = np.full(len(records), now, np.int64)
        for i, (record, level) in enumerate(zip(records, levels, strict=True)):
            value = get(record, level)
            try:
                if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                    raise ValueError("no time")
                text = repr(value) if isinstance(value, float) else str(value)
                out[i] = _times.from_text(text, self._config.time_unit or _times.guess([text]), None)
            except (ValueError, OverflowError) as error:
                bad.setdefault(i, ("bad-time", f"{self._config.time}: {error}"))
        return out

    def _drafts(
        self,
        n: int,
        columns: dict[str, Column],
        devices: list[str] | None,
        times: np.ndarray[tuple[int], np.dtype[np.int64]] | None,
        now: int,
    ) -> list[Draft]:
        moment = now if times is None else int(times[0])
        if devices is None or len(set(devices)) == 1:
            source = self._device if devices is None else devices[0]
            return [Draft(source, moment, Readings(n=n, columns=columns, time=times))]
        if not self._config.split:
            return [Draft(self._device, moment, Readings(n=n, columns=columns, time=times, source=devices))]
        places: dict[str, list[int]] = {}
        for i, device in enumerate(devices):
            places.setdefault(device, []).append(i)
        drafts = []
        for device, rows in places.items():
            pick = np.array(rows, np.int64)
            own = None if times is None else times[pick]
            body = Readings(n=len(rows), columns={k: take(c, pick) for k, c in columns.items()}, time=own)
            drafts.append(Draft(device, now if own is None else int(own[0]), body))
        return drafts


def _letter(delivery: Delivery, reason: str, detail: str) -> _Dead:
    return bytes(delivery.payload[:_KEPT]), reason, detail, delivery.topic


def _number(payload: Any) -> float:
    text = bytes(payload[:64]).decode("ascii", "replace").strip()
    if len(payload) > 64 or "_" in text:
        raise ValueError(f"{text[:40]!r} is not a number")
    return float(text)


def _text(payload: Any) -> str:
    return bytes(payload).decode("utf-8")
