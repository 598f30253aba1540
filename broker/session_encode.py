"""Publications as MQTT 5 packets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import mqtt5

from broker.bus import Publication
from broker.session_link import GATHER, Link
from broker.session_outbox import Outbox
from schemas.errors import BusError, PacketTooLargeError

_AT_LEAST_ONCE = mqtt5.QoS.AT_LEAST_ONCE
_QOS = (mqtt5.QoS.AT_MOST_ONCE, _AT_LEAST_ONCE)
_TOPICS = 4096  # whose beginnings are remembered
_NO_HEAD: tuple[None, bytes] = (None, b"")
_WORTH_AN_ALIAS = 8  # characters of a topic


class SessionOutbox(Outbox):
    """Writes to a :class:`broker.session_link.Link`.

    :param aliases: whether to use topic aliases where the broker offers them: for the first topics that come, as many as
        it takes.
    """

    def __init__(self, *, aliases: bool) -> None:
        super().__init__()
        self._use_aliases = aliases
        self._alias_room = 0
        self._aliases: dict[str, int] = {}
        self._heads: dict[str, tuple[str | None, bytes]] = {}
        """By topic: content type, and what stands between the fixed header and the payload at QoS 0."""
        self._wire: Link | None = None

    def start(self, link: Link, connack: mqtt5.ConnAckPacket) -> None:
        """As :meth:`attach`, which it calls."""
        self._wire = link
        self._alias_room = connack.topic_alias_max if self._use_aliases else 0
        self._aliases.clear()
        self._heads.clear()
        self.attach(link, connack)

    def detach(self) -> None:
        self._wire = None
        super().detach()

    def _send(self, publication: Publication, packet_id: int, *, duplicate: bool = False) -> BusError | None:
        """Encode and write one publication; why not, where it cannot be."""
        topic, payload = publication.topic, publication.payload
        name, alias, new = topic, None, False
        if self._alias_room:
            alias = self._aliases.get(topic)
            if alias is not None:
                name = ""
            elif len(self._aliases) < self._alias_room and len(topic) >= _WORTH_AN_ALIAS:
                alias, new = len(self._aliases) + 1, True
        if type(payload) is not bytes:
            if not isinstance(payload, (bytes, bytearray, memoryview)):
                return BusError(f"{topic}: the payload is {type(payload).__name__}, not bytes")
            if memoryview(payload).nbytes < GATHER:
                payload = bytes(payload)
        large = len(payload) >= GATHER
        try:
            if alias is None and not large and not duplicate and _plain(publication):
                # nearly all are like this, and arguments that say nothing cost more than the rest
                content = publication.content_type
                if not publication.qos:
                    packet = mqtt5.PublishPacket(name, payload, content_type=content)
                else:
                    qos = _AT_LEAST_ONCE
                    packet = mqtt5.PublishPacket(name, payload, qos=qos, packet_id=packet_id, content_type=content)
                data = packet.write()
            else:
                data = mqtt5.PublishPacket(
                    name,
                    b"" if large else payload,
                    qos=_QOS[publication.qos],
                    retain=publication.retain,
                    packet_id=packet_id or None,
                    duplicate=duplicate,
                    message_expiry_interval=publication.expiry,
                    content_type=publication.content_type,
                    topic_alias=alias,
                    user_properties=list(publication.properties),
                ).write()
        except (ValueError, TypeError, OverflowError) as error:
            return BusError(f"{topic}: cannot be sent: {error}")
        link = self._wire
        if link is None:
            return BusError(f"{topic}: no connection")
        if large:
            view = memoryview(payload)
            view = view.cast("B") if view.c_contiguous else memoryview(bytes(view))
            head = _head(data, view.nbytes)
            if len(head) + view.nbytes > self.largest:
                return PacketTooLargeError(topic, len(head) + view.nbytes, self.largest)
            link.write_large(head, payload if type(payload) is bytes else view)
        elif len(data) > self.largest:
            return PacketTooLargeError(topic, len(data), self.largest)
        else:
            link.write(data)
        if new and alias is not None:
            self._aliases[topic] = alias
        if not publication.qos and not large and _plain(publication):
            self._learn(topic, publication.content_type)
        return None

    def _learn(self, topic: str, content: str | None) -> None:
        """The next publication like this one begins as this one would now."""
        if len(self._heads) >= _TOPICS:
            self._heads.clear()
        alias = self._aliases.get(topic)
        name = topic if alias is None else ""
        made = mqtt5.PublishPacket(name, b"", content_type=content, topic_alias=alias).write()
        self._heads[topic] = content, made[_body(made) :]

    def _run(self, publications: Sequence[Publication], start: int, most: int) -> int:
        """QoS 0 on topics used before: the codec would make the same beginning again each time."""
        link = self._wire
        if link is None:
            return start
        heads, largest = self._heads, min(self.largest, GATHER)
        parts: list[bytes] = []
        size, stop = 0, min(len(publications), start + most)
        topic, content, head = "", None, b""
        index = start
        while index < stop and not link.congested:
            publication = publications[index]
            payload = publication.payload
            if publication.topic != topic or not head:
                topic = publication.topic
                content, head = heads.get(topic, _NO_HEAD)
            if (
                not head
                or publication.qos
                or publication.content_type != content
                or type(payload) is not bytes
                or not _plain(publication)
            ):
                break
            length = len(head) + len(payload)
            if length + 5 > largest:
                break
            if length < 128:
                parts += (_SHORT[length], head, payload)
            else:
                parts += (b"\x30" + _length(length), head, payload)
            size += length
            index += 1
            if size >= GATHER:
                link.write(b"".join(parts))
                parts.clear()
                size = 0
        if parts:
            link.write(b"".join(parts))
        return index


def _plain(publication: Publication) -> bool:
    return publication.expiry is None and not publication.properties and not publication.retain


def _body(packet: bytes) -> int:
    """Where a packet's fixed header ends."""
    last = 1
    while packet[last] & 128:
        last += 1
    return last + 1


@lru_cache(maxsize=4096)
def _length(size: int) -> bytes:
    """A remaining length (MQTT 5, 1.5.5)."""
    out = bytearray()
    while True:
        size, low = size >> 7, size & 127
        out.append(low | 128 if size else low)
        if not size:
            return bytes(out)


_SHORT = [bytes((0x30, size)) for size in range(128)]
"""Fixed headers of short publications at QoS 0."""


def _head(empty: bytes, payload: int) -> bytes:
    """Everything of a PUBLISH before a payload of ``payload`` bytes, made from the same packet without one."""
    rest = empty[_body(empty) :]
    return empty[:1] + _length(len(rest) + payload) + rest
