"""Publications as MQTT 5 packets."""

from __future__ import annotations

import mqtt5

from broker.bus import Publication
from broker.session_link import GATHER, Link
from broker.session_outbox import Outbox
from schemas.errors import BusError, PacketTooLargeError

_AT_LEAST_ONCE = mqtt5.QoS.AT_LEAST_ONCE
_QOS = (mqtt5.QoS.AT_MOST_ONCE, _AT_LEAST_ONCE)
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
        self._wire: Link | None = None

    def start(self, link: Link, connack: mqtt5.ConnAckPacket) -> None:
        """As :meth:`attach`, which it calls."""
        self._wire = link
        self._alias_room = connack.topic_alias_max if self._use_aliases else 0
        self._aliases.clear()
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
        return None


def _plain(publication: Publication) -> bool:
    return publication.expiry is None and not publication.properties and not publication.retain


def _head(empty: bytes, payload: int) -> bytes:
    """Everything of a PUBLISH before a payload of ``payload`` bytes, made from the same packet without one."""
    body = 1
    while empty[body] & 128:
        body += 1
    rest = empty[body + 1 :]
    left = len(rest) + payload
    head = bytearray(empty[:1])
    while True:
        left, low = left >> 7, left & 127
        head.append(low | 128 if left else low)
        if not left:
            break
    return bytes(head) + rest
