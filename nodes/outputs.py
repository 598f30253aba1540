"""The sending side of a node: its ports, what is kept until it is done, and the consumers' acknowledgements.

Every message of a port goes out once on the port's topic, where anybody may listen; what one consumer lacks is sent again on
that consumer's private topic. Nodes of the same process get the objects themselves.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from broker.bus import Bus, Publication, Receipt
from broker.window import Ack, Kept, Knock, SendWindow, pack, unpack_ack
from nodes import log
from nodes.assignment import NodeSpec
from nodes.channel import Channel, Mark
from nodes.handover import Handover
from nodes.journal import Journal
from nodes.lanes import Lanes, Member, by_source, newest
from nodes.merge import FLOOR
from schemas import codec, topics
from schemas.errors import BusError, ClosedError, PacketTooLargeError, PayloadError, PublishFailedError
from schemas.messages import End, Message, Progress, State

if TYPE_CHECKING:
    from broker.local import LocalBus
    from nodes.sharing import Writing

_ASK_CHECK = 0.25
"""Seconds between looks for who has had no progress."""
_MOST_TOPICS = 65536
"""Topics that are remembered, by port and source."""
_GLANCE = 0.02
"""Seconds between looks for room in shared memory, should a reader that was killed not have told us of it."""
_PATIENCE = 5.0
"""Seconds of silence of a consumer before we say that we wait for it."""


class Staged(msgspec.Struct):
    """What waits to be sent. With a durable outbox: ``upto``: the last number of each channel that it holds; ``handed``:
    likewise of what goes to readers in this process.
    """

    remote: list[Publication]
    local: list[Publication]
    upto: dict[str, int]
    handed: dict[str, int]


class Outputs:
    """All ports of one node.

    :param bus: the node's connection; None when nothing leaves the process.
    :param local: the in-process bus; None when no node of this process reads us.
    :param epoch: this incarnation's numbering (ns of its start), or the kept one of a durable outbox.
    :param durable: numbered messages go to the journal's outbox, and out only after :meth:`flush`.
    :param progress: called when something more is done.
    """

    def __init__(
        self,
        topology: str,
        spec: NodeSpec,
        *,
        bus: Bus | None,
        local: LocalBus | None,
        journal: Journal,
        epoch: int,
        earlier: Sequence[int],
        durable: bool,
        progress: Callable[[], None],
        window: int = 1024,
        window_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self._topology = topology
        self._node = spec.name
        self._public = spec.public
        self._ports = {port.name: port for port in spec.outputs}
        self._bus = bus
        self._inside = bus is None or not any(p.remote or p.publish or p.teams or p.shared for p in spec.outputs)
        """Nothing leaves the process."""
        self._local = local
        self._durable = durable
        self._progress = progress
        self._room = asyncio.Event()
        self._heard = asyncio.Event()
        self._channels: dict[str, Channel] = {}
        self._lanes: dict[str, list[Lanes]] = {}
        self._staged: list[Publication] = []
        self._staged_local: list[Publication] = []
        self._fresh: list[tuple[str, int, str, bytes]] = []
        self._receipts: set[Receipt] = set()
        self._advanced = FLOOR
        self._known: dict[tuple[str, str], str] = {}
        self._shared: dict[str, Writing] = {}
        numbers = (journal.get("numbers") or {}) if durable else {}

        def channel(key: str, port: str, peers: dict[str, bool], lane: str | None = None) -> Channel:
            kept = journal.outbox(key) if durable else []
            first = kept[0][0] if kept else numbers.get(key, 1)
            made = SendWindow(epoch, peers, messages=window, size=window_bytes, first=first, earlier=earlier)
            end = topics.output(topology, self._public, port)
            for _, topic, payload in kept:
                made.push(
                    topic,
                    payload,
                    time.monotonic_ns(),
                    final=topic == end or (lane is not None and any(peers.values())),
                )
            made.committed = made.next - 1 if durable else None
            found = self._channels[key] = Channel(key, port, made, lane)
            return found

        self._handovers = {
            port.name: Handover(key, journal.outbox(key), numbers.get(key, 1))
            for port in spec.outputs
            if durable and port.handed and (key := Handover.key_of(port.name))
        }
        for port in spec.outputs:
            if port.remote:
                made = channel(port.name, port.name, port.remote)
                if port.shared and bus is not None:
                    from nodes.sharing import Writing

                    self._shared[port.name] = Writing(
                        self._node, port.name, made, readers=[*port.shared.values()], always=port.always, whole=durable
                    )
            for target, team in port.teams.items():
                members = []
                for name in team.members:
                    lane = topics.lane(topology, name, self._node, port.name)
                    members.append(Member(name, channel(f"{port.name}/{name}", port.name, {name: team.fast}, lane)))
                self._lanes.setdefault(port.name, []).append(Lanes(self._node, target, members))

    @property
    def waiting(self) -> list[str]:
        """Remote consumers that were never heard of."""
        return sorted({name for channel in self._channels.values() for name in channel.window.waiting})

    @property
    def idle(self) -> bool:
        """Nothing is kept any more: every consumer is done with everything. One that is away has its end to come for."""
        return self._receipts == set() and not any(
            channel.window.kept or channel.floor != channel.window.floor for channel in self._channels.values()
        )

    @property
    def only_end(self) -> bool:
        """Consumers are done with everything but the end of the stream."""
        return not self._receipts and all(kept.final for c in self._channels.values() for kept in c.window.kept)

    @property
    def releasable(self) -> bool:
        """The durable outbox holds rows that are done and may be forgotten, or is to get some that no step brings."""
        return self._durable and (
            bool(self._fresh)
            or any(c.released != c.window.floor for c in self._channels.values())
            or any(h.released != h.floor for h in self._handovers.values())
        )

    @property
    def staged(self) -> bool:
        """Something is to be sent after the next commit."""
        return bool(self._staged or self._staged_local)

    @property
    def backlog(self) -> int:
        """Messages sent and not yet done."""
        return sum(len(channel.window.kept) for channel in self._channels.values())

    @property
    def moved(self) -> dict[str, int]:
        """By consumer: messages that one of its replicas took over from another."""
        return {lanes.target: lanes.moved for several in self._lanes.values() for lanes in several if lanes.moved}

    def left(self, consumer: str) -> None:
        """A consumer has ended and left; its last acknowledgement may have been lost with a broker."""
        for channel in self._channels.values():
            channel.window.left(consumer)
        self._heard.set()
        self._moved()

    async def start(self) -> None:
        """Listen for acknowledgements and make ourselves known to the consumers."""
        if self._bus is None or not self._channels:
            return
        pattern = f"{self._topology}/{self._node}/ack/#"
        self._acks = await self._bus.subscribe([pattern], qos=1, capacity=4096, overflow="latest")
        if teams := [member for _, _, member in self._members()]:
            states = [topics.state(self._topology, member.name) for member in teams]
            self._states = await self._bus.subscribe(states, qos=1, capacity=4096, overflow="latest")
        await self.knock()

    async def listen(self) -> None:
        """Take acknowledgements for ever; a task of the runtime's."""
        if self._bus is None or not self._channels:
            return
        while True:
            for delivery in (batch := await self._acks.receive()):
                parts = delivery.topic.split("/")
                if len(parts) != 5 or (ack := unpack_ack(delivery.payload)) is None:
                    continue
                channel = self._channels.get(f"{parts[3]}/{parts[4]}") or self._channels.get(parts[3])
                if channel is not None:
                    await self._acknowledged(channel, parts[4], ack)
            self._acks.acknowledge(batch)
            self._moved()

    async def watch(self) -> None:
        """Take the states of consumers that are replicas, for ever; a task of the runtime's."""
        if self._bus is None or not self._lanes:
            return
        while True:
            for delivery in (batch := await self._states.receive()):
                try:
                    body = codec.decode(delivery.payload).body
                except PayloadError:
                    continue
                if isinstance(body, State):
                    for _, lanes, member in self._members():
                        if member.name == body.node:
                            lanes.told(member.name, body.status, time.monotonic())
            self._states.acknowledge(batch)

    def _members(self) -> Iterator[tuple[str, Lanes, Member]]:
        for port, several in self._lanes.items():
            for lanes in several:
                for member in lanes.members.values():
                    yield port, lanes, member

    def _is_taken(self, channel: Channel) -> bool:
        return any(member.channel is channel and member.taken for _, _, member in self._members())

    async def resend(self) -> None:
        """Ask consumers that have had no progress what they lack, for ever; a task of the runtime's."""
        quiet = time.monotonic() + _PATIENCE
        while self._bus is not None and self._channels:
            await asyncio.sleep(_ASK_CHECK)
            now = time.monotonic_ns()
            asked = [(consumer, c) for c in self._channels.values() for consumer in c.window.due(now)]
            if asked:
                await self._ask(asked)
            for several in self._lanes.values():
                for lanes in several:
                    await self._divide(lanes)
            if self.waiting and time.monotonic() > quiet:
                quiet = time.monotonic() + 6 * _PATIENCE
                log.info("waiting for consumers", node=self._node, consumers=", ".join(self.waiting))
                await self.knock()

    async def _divide(self, lanes: Lanes) -> None:
        """See which replicas are there, and move what belongs to those that are not."""
        for member in lanes.lost(time.monotonic()):
            channel, floor, now = member.channel, member.channel.window.floor, time.monotonic_ns()
            debts: dict[str, tuple[Channel, int]] = {}
            moved: list[Publication] = []
            for kept in channel.window.withdraw():
                message, _, _ = codec.decode_sequenced(kept.payload)
                if isinstance(message.body, Progress):  # the others are told so themselves
                    continue
                there = lanes.of(message.source or self._public)
                debts[there.key] = (there, there.window.next)
                payload = self._encode(there, message)
                self._keep(there, there.lane or "", payload, now)
                moved.append(_publication(message, there.lane or "", payload, 1))
            channel.owe(debts, floor)
            lanes.moved += len(moved)
            log.warning("replica is away, others take over", node=self._node, replica=member.name, messages=len(moved))
            if self._durable:
                self._staged += moved  # they leave after their commit
            elif moved and self._bus is not None:
                await self._bus.publish(moved)
            self._moved()
        if lanes.settled():
            self._moved()
        if (behind := lanes.behind()) and self._bus is not None:
            told = [self._tell(member.channel, lanes.newest) for member in behind]
            if self._durable:
                self._staged += told
                self._progress()
            else:
                await self._bus.publish(told)

    def advance(self, time: int) -> None:
        """Stage that every port has come to this event time, if it was not told before (a replica passes it on)."""
        if time <= self._advanced:
            return
        self._advanced = time
        for channel in self._channels.values():
            self._staged.append(self._tell(channel, time))

    def _tell(self, channel: Channel, time_: int) -> Publication:
        message = Message(f"{self._public}:progress", self._public, time_, Progress(time=time_))
        topic = channel.lane or topics.output(self._topology, self._public, channel.port)
        payload = self._encode(channel, message)
        if channel.window.sequenced:
            self._keep(channel, topic, payload, time.monotonic_ns())
        return _publication(message, topic, payload, 1 if channel.window.sequenced else 0)

    def divided(self, sent: list[tuple[str, Message]]) -> list[tuple[str, Message]]:
        """Messages with rows of several devices in parts, where a reader has replicas; the same list where none has."""
        if not self._lanes:
            return sent
        return [(port, part) for port, m in sent for part in (by_source(m) if port in self._lanes else [m])]

    async def ready(self) -> None:
        """Hand over what an earlier life left; wait until remote consumers were heard of, so that what is sent first is not lost.

        A durable outbox loses nothing, and does not wait.
        """
        left = [publication for handover in self._handovers.values() for publication in handover.left]
        await self.flush(
            Staged([], left, {}, {port: h.next - 1 for port, h in self._handovers.items()} if left else {})
        )
        while any(
            not peer.heard and not peer.ended and (peer.fast or not self._durable)
            for channel in self._channels.values()
            for peer in channel.window.peers.values()
        ):
            self._heard.clear()
            await self._heard.wait()

    @property
    def encodes(self) -> bool:
        """Messages leave the process, as bytes."""
        return self._bus is not None

    @property
    def at_once(self) -> int:
        """Messages that may be staged before :meth:`room` is to be asked again."""
        if not self._shared:
            return sys.maxsize
        return min(writing.at_once for writing in self._shared.values())

    @property
    def open(self) -> bool:
        """Every channel has room, and no replica waits for its part."""
        if not self._channels:  # lanes and shared memory have channels
            return True
        return (
            all(c.window.room or self._is_taken(c) for c in self._channels.values())
            and not any(lanes.settling for several in self._lanes.values() for lanes in several)
            and all(writing.room for writing in self._shared.values())
        )

    async def room(self) -> None:
        """Wait until every port has room: the back-pressure of the slowest consumer."""
        if self._shared:
            # what is staged leaves at the end of the loop's turn; its readers begin while the next is written
            await asyncio.sleep(0)
        while not self.open:
            self._room.clear()
            if self._shared:
                await self._glance()
            else:
                await self._room.wait()

    async def _glance(self) -> None:
        """Wait until there may be room in shared memory, or for a moment."""
        for writing in self._shared.values():
            writing.call(self._room.set)
        if self.open:  # a reader was done before it could read that we wait
            return
        timer = asyncio.get_running_loop().call_later(_GLANCE, self._room.set)
        try:
            await self._room.wait()
        finally:
            timer.cancel()

    def stage(self, sent: Sequence[tuple[str, Message]], mark: Mark) -> list[tuple[Message, str]]:
        """Number and encode messages; they leave with :meth:`flush`. ``mark`` is told what to wait for.

        :returns: messages that cannot travel (larger than the broker takes), with the reason.
        """
        refused: list[tuple[Message, str]] = []
        if self._inside or self._bus is None:
            self._stage_local(sent)
            return refused
        now, limit = time.monotonic_ns(), self._bus.max_payload
        shared: dict[str, list[Message]] = {}
        for name, message in sent:
            port = self._ports.get(name)
            if port is None:
                continue
            source = message.source or self._public
            topic = topics.output(self._topology, self._public, name, source)
            ways: list[tuple[Channel | None, str]] = []
            if port.shared:
                if why := self._shared[name].too_large(message, topic, limit):
                    refused.append((message, why))
                    continue
                shared.setdefault(name, []).append(message)
            elif port.publish:
                ways.append((self._channels.get(name), topic))
            for lanes in self._lanes.get(name, ()):
                lanes.newest = max(lanes.newest, newest(message))
                channel = lanes.of(source)
                ways.append((channel, channel.lane or topic))
            coded = [(way, to, self._encode(way, message)) for way, to in ways]
            if limit is not None and (over := max((len(p) + len(to) for _, to, p in coded), default=0)) > limit:
                refused.append((message, f"{over} bytes, the broker takes at most {limit}"))
                continue
            for way, to, payload in coded:
                numbered = way is not None and way.window.sequenced
                if way is not None and numbered:
                    mark.number(way, way.window.next)
                    self._keep(way, to, payload, now)
                self._staged.append(_publication(message, to, payload, 1 if numbered else 0))
            if port.local:
                self._hand(name, Publication(topic, message, qos=1))
        for name, messages in shared.items():
            self._share(name, messages, mark, now)
        return refused

    def hand(self, sent: Sequence[tuple[str, Message]]) -> bool:
        """Give messages to readers of this process who wait for them; False: they are to be staged. Nothing waits for it."""
        local = self._local
        if local is None or not sent or not self._inside or self._durable:
            return False
        name = sent[0][0]
        port = self._ports.get(name)
        if port is None or not port.local:
            return False
        if len(sent) > 1:
            for other, _ in sent:
                if other != name:
                    return False
        topic = self._known.get((name, ""))
        if topic is None:
            topic = self._known[name, ""] = topics.output(self._topology, self._public, name, self._public)
        return local.hub.hand(topic, [message for _, message in sent])

    def _stage_local(self, sent: Sequence[tuple[str, Message]]) -> None:
        """:meth:`stage` where all readers are in this process."""
        known, staged = self._known, self._staged_local
        for name, message in sent:
            topic = known.get((name, message.source))
            if topic is None:
                if (port := self._ports.get(name)) is None or not port.local:
                    continue
                if len(known) >= _MOST_TOPICS:
                    known.clear()
                source = message.source or self._public
                topic = known[name, message.source] = topics.output(self._topology, self._public, name, source)
            publication = Publication(topic, message, 1)
            if self._handovers:
                self._hand(name, publication)
            else:
                staged.append(publication)

    def _share(self, port: str, messages: Sequence[Message], mark: Mark, now: int) -> None:
        """Stage messages of a port with readers that share our memory."""
        writing, staged = self._shared[port], self._staged
        channel, to = writing.channel, topics.shared(self._topology, self._public, port)
        numbered = channel.window.sequenced
        if not numbered and not any(message.trace for message in messages):
            staged += [_publication(messages[0], to, payload, 0) for payload in writing.encode_all(messages)]
            for message in messages:
                self._show(port, writing, message, 0, 0, now)
            return
        for message in messages:
            epoch, seq = (channel.window.epoch, channel.window.next) if numbered else (0, 0)
            payload = writing.encode(message, epoch, seq)
            if numbered:
                mark.number(channel, seq)
                self._keep(channel, self._topic(port, message), payload, now)
            staged.append(_publication(message, to, payload, 1 if numbered else 0))
            self._show(port, writing, message, epoch, seq, now)

    def _show(self, port: str, writing: Writing, message: Message, epoch: int, seq: int, now: int) -> None:
        """Stage a message of such a port for the public, if anybody listens."""
        if wanted := writing.audience.wants(now / 1e9):
            payload = codec.encode(message, epoch=epoch, seq=seq)
            public = _publication(message, self._topic(port, message), payload, 1 if wanted is not True or seq else 0)
            self._staged.append(public if wanted is True else msgspec.structs.replace(public, heard=wanted))

    def _topic(self, port: str, message: Message) -> str:
        return topics.output(self._topology, self._public, port, message.source or self._public)

    def _hand(self, port: str, publication: Publication) -> None:
        """Stage what goes to readers in this process."""
        if (handover := self._handovers.get(port)) is not None:
            self._fresh.append(handover.row(publication))
        self._staged_local.append(publication)

    def _encode(self, way: Channel | None, message: Message, *, always: bool = False) -> bytes:
        if way is None or not (always or way.window.sequenced):
            return codec.encode(message)
        return codec.encode(message, epoch=way.window.epoch, seq=way.window.next)

    def _keep(self, way: Channel, topic: str, payload: bytes, now: int, *, final: bool = False) -> None:
        """Keep what was encoded with the next number of a channel until it is done."""
        if self._durable:
            self._fresh.append((way.key, way.window.next, topic, payload))
        way.window.push(topic, payload, now, final=final)

    def end(self, mark: Mark, messages: dict[str, int]) -> None:
        """Stage the end of every port's stream; ``messages`` were sent on each."""
        now = time.time_ns()
        for name, port in self._ports.items():
            message = Message(f"{self._public}:end", self._public, now, End(messages=messages.get(name, 0)))
            topic = topics.output(self._topology, self._public, name)
            ways = [channel for channel in self._channels.values() if channel.port == name]
            for channel in ways:
                to, payload = channel.lane or topic, self._encode(channel, message, always=True)
                mark.number(channel, channel.window.next)
                self._keep(channel, to, payload, time.monotonic_ns(), final=True)
                self._staged.append(_publication(message, to, payload, 1))
                if port.shared:
                    to = topics.shared(self._topology, self._public, name)
                    self._staged.append(_publication(message, to, payload, 1))
            if name not in self._channels and port.publish and self._bus is not None:
                self._staged.append(_publication(message, topic, codec.encode(message), 1))
            if port.local:
                self._hand(name, Publication(topic, message, qos=1))

    def outbox(self) -> tuple[list[tuple[str, int, str, bytes]], dict[str, int], dict[str, object]]:
        """For the journal: new outbox rows, floors up to which old ones may go, and counters. Clears the new rows."""
        fresh, self._fresh = self._fresh, []
        if not self._durable:
            return fresh, {}, {}
        for channel in self._channels.values():
            channel.released = channel.window.floor
        floors = {key: channel.released for key, channel in self._channels.items()}
        numbers = {key: channel.window.next for key, channel in self._channels.items()}
        for handover in self._handovers.values():
            handover.released = floors[handover.key] = handover.floor
            numbers[handover.key] = handover.next
        return fresh, floors, {"numbers": numbers}

    def take_staged(self) -> Staged:
        """What was staged so far; the caller passes it to :meth:`flush`."""
        upto: dict[str, int] = {}
        handed: dict[str, int] = {}
        if self._durable:
            upto = {key: channel.window.next - 1 for key, channel in self._channels.items()}
            handed = {port: handover.next - 1 for port, handover in self._handovers.items()}
        staged = Staged(self._staged, self._staged_local, upto, handed)
        self._staged, self._staged_local = [], []
        return staged

    async def flush(self, staged: Staged, mark: Mark | None = None) -> None:
        """Send what was staged; waits while a bus is full. With a durable outbox: it is committed."""
        remote, local = staged.remote, staged.local
        for key, last in staged.upto.items():
            self._channels[key].window.committed = last
        if local and self._local is not None:
            receipt = await self._local.publish(local)
            for port, last in staged.handed.items():
                self._handovers[port].flew(last, receipt)
            if not receipt.done():
                self._receipts.add(receipt)
                receipt.add_done_callback(self._local_done)
                if mark is not None:
                    mark.receipt(receipt)
        if remote and self._bus is not None:
            receipt = await self._bus.publish(remote)
            receipt.add_done_callback(self._published)

    async def knock(self) -> None:
        """Tell every remote consumer where our numbering begins; they answer with where they stand."""
        for channel in self._channels.values():
            channel.window.anew(time.monotonic_ns())
        await self._ask([(consumer, c) for c in self._channels.values() for consumer in c.window.peers])

    async def _ask(self, whom: Sequence[tuple[str, Channel]]) -> None:
        """Knock at these consumers, for these channels."""
        if not whom or self._bus is None:
            return
        knocks = [
            self._control(channel, consumer, pack(Knock(channel.window.epoch, channel.window.base, self._durable)))
            for consumer, channel in whom
        ]
        await self._bus.publish(knocks)

    def _control(self, channel: Channel, consumer: str, payload: bytes) -> Publication:
        return Publication(topics.again(self._topology, consumer, self._node, channel.port), payload, qos=0)

    async def _acknowledged(self, channel: Channel, consumer: str, ack: Ack) -> None:
        knock, again = channel.window.heard(consumer, ack, time.monotonic_ns())
        for lanes in self._lanes.get(channel.port, ()):
            lanes.rooted(consumer, rooted=ack.rooted)
        self._heard.set()
        if knock is not None and self._bus is not None:
            await self._bus.publish([self._control(channel, consumer, pack(knock))])
        if again:
            await self._again(channel, consumer, again)

    async def _again(self, channel: Channel, consumer: str, kept: Sequence[Kept]) -> None:
        if self._bus is None:
            return
        log.debug("sent again", node=self._node, port=channel.port, consumer=consumer, messages=len(kept))
        real = found.real if (found := self._shared.get(channel.key)) is not None else bytes
        await self._bus.publish([self._control(channel, consumer, real(k.payload)) for k in kept])

    def _moved(self) -> None:
        if self.open:
            self._room.set()
        self._progress()

    def _local_done(self, receipt: Receipt) -> None:
        self._receipts.discard(receipt)
        if not receipt.cancelled() and (error := receipt.exception()) and not isinstance(error, ClosedError):
            log.warning("local hand-over failed", node=self._node, reason=str(error))
        self._progress()

    def _published(self, receipt: Receipt) -> None:
        if receipt.cancelled() or (error := receipt.exception()) is None or isinstance(error, ClosedError):
            return
        reasons: list[BusError] = (
            [e for _, e in error.failures] if isinstance(error, PublishFailedError) else [BusError(str(error))]
        )
        level = log.warning if all(isinstance(e, PacketTooLargeError) for e in reasons) else log.error
        level("the broker refused a message", node=self._node, count=len(reasons), reason=str(reasons[0]))


def _publication(message: Message, topic: str, payload: bytes, qos: Literal[0, 1]) -> Publication:
    properties = (("traceparent", message.trace),) if message.trace else ()
    return Publication(topic, payload, qos=qos, properties=properties, content_type=codec.CONTENT_TYPE)
