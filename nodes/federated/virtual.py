"""A bus and a clock that are not real: hundreds of machines in one thread, each as slow, as far and as mortal as one likes.

What a machine commits is kept as msgpack bytes, so that a machine begun again has what a disk would have given it and nothing
else. Time jumps from event to event; the same seed gives the same run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
import numpy as np

from nodes.federated.machine import Answer, Machine, Say
from nodes.federated.rules import SECOND, ns

Make: TypeAlias = Callable[[], Machine]
Took: TypeAlias = Callable[[Machine, str], float]
Fault: TypeAlias = Callable[[str, str], float | None]

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode

BEGAN = 1_800_000_000 * SECOND


@dataclass(frozen=True, slots=True)
class Link:
    """How far a machine is from the bus.

    :param delay: seconds, one way.
    :param jitter: up to so many more, drawn for each message: with it messages overtake each other.
    :param loss: part of the deliveries that never arrive, though the bus took them.
    :param twice: part of the deliveries that arrive twice.
    """

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    twice: float = 0.0


@dataclass(slots=True)
class Peer:
    """A machine in its place.

    :param make: makes the machine anew, as after a restart of its process.
    :param took: seconds that a work takes it.
    :param fault: asked at each point (``commit``: before one, ``committed``, ``said``) whether it dies there, with the keys or
        the topic: the seconds until it is back, or None.
    :param machine: while it lives.
    :param disk: what it committed.
    :param life: grows at each birth and death; what belongs to another life is not delivered.
    """

    name: str
    make: Make
    link: Link
    took: Took
    fault: Fault | None = None
    machine: Machine | None = None
    disk: dict[str, bytes] = field(default_factory=dict)
    life: int = 0
    due: int | None = None
    linked: bool = True
    over: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)


class _Disk(Mapping[str, Any]):
    """What a peer has committed last."""

    def __init__(self, kept: dict[str, bytes]) -> None:
        self._kept = kept

    def __getitem__(self, key: str) -> Any:
        return _decode(self._kept[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


class World:
    """All peers of one job, the bus between them and the time.

    :param tap: sees every publication: (peer, what it said).
    :param witness: sees every commit: (peer, what it committed).
    """

    def __init__(
        self,
        seed: int = 0,
        tap: Callable[[Peer, Say], None] | None = None,
        witness: Callable[[Peer, dict[str, Any]], None] | None = None,
    ) -> None:
        self.now = BEGAN
        self.peers: dict[str, Peer] = {}
        self.retained: dict[str, bytes] = {}
        self.published = 0
        self.delivered = 0
        self.tap, self.witness = tap, witness
        self._exact: dict[str, list[Peer]] = {}
        self._wild: dict[tuple[int, str], list[tuple[list[str], Peer]]] = {}
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = self._ticks = self._ticked = 0
        self._random = np.random.default_rng(seed)
        self._draws: Iterator[float] = iter(())

    def add(
        self,
        name: str,
        make: Make,
        *,
        link: Link = Link(),
        took: Took = lambda machine, work: 0.0,
        fault: Fault | None = None,
        at: float = 0.0,
    ) -> Peer:
        """A machine that begins ``at`` seconds from now."""
        peer = self.peers[name] = Peer(name, make, link, took, fault)
        self.after(at, self.begin, peer)
        return peer

    # -- time -------------------------------------------------------------------------------------------------------

    def after(self, seconds: float, act: Callable[..., None], *given: Any) -> None:
        """Call ``act`` so many seconds from now."""
        self._at(self.now + ns(seconds), act, *given)

    def _at(self, time: int, act: Callable[..., None], *given: Any) -> None:
        self._number += 1
        heapq.heappush(self._heap, (time, self._number, act, given))

    def run(self, until: Callable[[], bool] | None = None, *, seconds: float = 1e6) -> bool:
        """Let time pass until that holds, nothing happens any more, or so many seconds are over.

        True: it holds; without ``until``: nothing happens any more.
        """
        end = self.now + ns(seconds)
        heap = self._heap
        while heap:
            if until is not None and until():
                return True
            if heap[0][0] > end:
                self.now = end
                return False
            self.now, _, act, given = heapq.heappop(heap)
            act(*given)
        return until is None or until()

    # -- lives ------------------------------------------------------------------------------------------------------

    def begin(self, peer: Peer) -> None:
        """Its process starts; nothing if it runs."""
        if peer.machine is not None or peer.over:
            return
        peer.life += 1
        peer.linked = True
        machine = peer.machine = peer.make()
        for pattern in machine.filters():
            if "+" in pattern:
                parts = pattern.split("/")
                self._wild.setdefault((len(parts), parts[0]), []).append((parts, peer))
            else:
                self._exact.setdefault(pattern, []).append(peer)
        life = peer.life
        self._apply(peer, machine.start(_Disk(peer.disk), self.now))
        if peer.life == life:
            self._catch_up(peer, machine)

    def kill(self, peer: Peer, *, will: float = 0.0) -> None:
        """Its process dies; the bus says its will ``will`` seconds later, unless it is back by then."""
        machine = peer.machine
        if machine is None:
            return
        peer.machine, peer.due = None, None
        peer.life += 1
        self._unsubscribe(peer)
        if (last := machine.will()) is not None:
            self.after(will, self._will, peer, peer.life, last)

    def cut(self, peer: Peer, seconds: float) -> None:
        """Its link is down for so long: it hears nothing and what it says is lost."""
        peer.linked = False
        machine = peer.machine
        if machine is None:
            return
        if (last := machine.will()) is not None:
            self._publish(peer, last)
        self.after(seconds, self._restore, peer, peer.life)

    def _restore(self, peer: Peer, life: int) -> None:
        if peer.life == life and peer.machine is not None:
            peer.linked = True
            self._apply(peer, peer.machine.linked(self.now))
            if peer.life == life and peer.machine is not None:
                self._catch_up(peer, peer.machine)

    def _will(self, peer: Peer, life: int, last: Say) -> None:
        if peer.life == life:
            self._publish(peer, last)

    def _unsubscribe(self, peer: Peer) -> None:
        for key, those in self._wild.items():
            self._wild[key] = [(parts, other) for parts, other in those if other is not peer]
        for others in self._exact.values():
            if peer in others:
                others.remove(peer)

    def _catch_up(self, peer: Peer, machine: Machine) -> None:
        for pattern in machine.filters():
            parts = pattern.split("/")
            if "+" not in parts:
                if pattern in self.retained:
                    self._send(peer, pattern, self.retained[pattern])
                continue
            for topic, payload in self.retained.items():
                if _matches(parts, topic.split("/")):
                    self._send(peer, topic, payload)

    # -- what machines want -----------------------------------------------------------------------------------------

    def _dies(self, peer: Peer, point: str, what: Iterable[str]) -> bool:
        if peer.fault is None or (back := peer.fault(point, ",".join(what))) is None:
            return False
        self.kill(peer)
        self.after(back, self.begin, peer)
        return True

    def _apply(self, peer: Peer, answer: Answer) -> None:
        if answer.commit:
            if self._dies(peer, "commit", answer.commit):
                return
            for key, value in answer.commit.items():
                if value is None:
                    peer.disk.pop(key, None)
                else:
                    peer.disk[key] = _encode(value)
            if self.witness is not None:
                self.witness(peer, answer.commit)
            if self._dies(peer, "committed", answer.commit):
                return
        peer.rows += answer.rows
        for say in answer.say:
            if peer.linked:
                self._publish(peer, say)
            if self._dies(peer, "said", (say.topic,)):
                return
        machine = peer.machine
        if machine is None:
            return
        if answer.over:
            peer.over = True
            peer.machine, peer.due = None, None
            peer.life += 1
            self._unsubscribe(peer)
            return
        if answer.work is not None:
            work = answer.work
            try:
                result = work.act()
            except Exception as error:  # noqa: BLE001 - whatever it is, the machine gets it
                result = error
            self.after(peer.took(machine, work.name), self._worked, peer, peer.life, work.name, result)
        due = machine.wake()
        if due is not None and (peer.due is None or due < peer.due):
            peer.due = due
            self._at(max(due, self.now), self._tick, peer, peer.life, due)

    def _worked(self, peer: Peer, life: int, name: str, result: Any) -> None:
        if peer.life == life and peer.machine is not None:
            self._apply(peer, peer.machine.worked(name, result, self.now))

    def _tick(self, peer: Peer, life: int, due: int) -> None:
        if peer.life != life or peer.machine is None or peer.due != due:
            return
        peer.due = None
        wanted = peer.machine.wake()
        if wanted is not None and wanted > self.now:  # put off in the meantime
            peer.due = wanted
            self._at(wanted, self._tick, peer, life, wanted)
            return
        self._ticks = self._ticks + 1 if self.now == self._ticked else 0
        self._ticked = self.now
        if self._ticks > 100_000:
            raise RuntimeError(f"{peer.name} wants to be woken again and again, and does nothing")
        self._apply(peer, peer.machine.tick(self.now))

    # -- the bus ----------------------------------------------------------------------------------------------------

    def _publish(self, peer: Peer, say: Say) -> None:
        self.published += 1
        if self.tap is not None:
            self.tap(peer, say)
        self.inject(say.topic, say.payload, retain=say.retain, link=peer.link)

    def inject(self, topic: str, payload: bytes, *, retain: bool = False, link: Link = Link()) -> None:
        """A publication by anybody."""
        if retain:
            if payload:
                self.retained[topic] = payload
            else:
                self.retained.pop(topic, None)
        if link.loss and self._draw() < link.loss:
            return
        lag = link.delay + (link.jitter * self._draw() if link.jitter else 0.0)
        for peer in self._exact.get(topic, ()):
            self._send(peer, topic, payload, lag)
        parts = topic.split("/")
        for pattern, peer in self._wild.get((len(parts), parts[0]), ()):
            if _matches(pattern, parts):
                self._send(peer, topic, payload, lag)

    def _send(self, peer: Peer, topic: str, payload: bytes, lag: float = 0.0) -> None:
        link = peer.link
        if link.loss and self._draw() < link.loss:
            return
        lag += link.delay
        if link.jitter:
            lag += link.jitter * self._draw()
        self.after(lag, self._deliver, peer, peer.life, topic, payload)
        if link.twice and self._draw() < link.twice:
            self.after(lag + link.jitter * self._draw(), self._deliver, peer, peer.life, topic, payload)

    def _deliver(self, peer: Peer, life: int, topic: str, payload: bytes) -> None:
        if peer.life == life and peer.machine is not None and peer.linked:
            self.delivered += 1
            self._apply(peer, peer.machine.heard(topic, payload, self.now))

    def _draw(self) -> float:
        for value in self._draws:
            return value
        self._draws = iter(self._random.random(4096).tolist())
        return next(self._draws)


def _matches(pattern: list[str], topic: list[str]) -> bool:
    if len(pattern) != len(topic):
        return False
    return all(want in {"+", have} for want, have in zip(pattern, topic, strict=True))
