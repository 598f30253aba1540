"""The side of a pool that takes: opens what gateways give, keeps it among its examples, and forgets it when they withdraw.

What a batch holds is in the store of examples before it is committed that the batch is there, and that before it is
acknowledged: killed in between, the same batch comes again and changes nothing. It is counted by its number under one consent;
what comes again under a consent that was withdrawn is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from broker.blobs import BlobError
from nodes.federated import pool_wire, wire
from nodes.federated.examples import Example, ExampleStore, MisshapenError
from nodes.federated.identity import Ear
from nodes.federated.machine import Answer, Machine, Say, Work
from nodes.federated.pool_wire import REFUSED, TAKEN, WITHDRAWN, Batch, Opened, Withdrawal
from nodes.federated.rules import SECOND
from nodes.federated.uploads import Place, Uploads
from schemas.errors import PayloadError, PenstockError

if TYPE_CHECKING:
    from nodes.privacy.keys import Signer

PULSE = 60 * SECOND
"""It is said again so often that there is a pool."""
QUEUE = 16 * 2**20
"""Bytes that wait to be opened; more is passed over, and comes again."""
_ROOM = 64 * 1024
"""Bytes of a batch beside its examples' identities and numbers."""


class RefusedError(PenstockError):
    """This batch does not count.

    :param reason: a short stable word: ``job``, ``unknown``, ``plain``, ``seal``, ``withdrawn``, ``stale``, ``form``, or one
        of :class:`PayloadError`'s.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(slots=True)
class Gift:
    """What is known of one client's gifts.

    :param life: of the consent under which the last batch came; ``upto``: its number.
    :param examples: that came under it, in all.
    :param until: consents that began up to then are withdrawn.
    """

    life: int = 0
    upto: int = 0
    examples: int = 0
    until: int = 0


@dataclass(frozen=True, slots=True)
class _Took:
    client: str
    batch: Batch
    examples: int


@dataclass(frozen=True, slots=True)
class _Forgot:
    client: str
    until: int
    examples: int


class Pool(Machine):
    """One job's pool.

    :param examples: where they are kept.
    :param fits: looks whether the model takes an example; called in the thread.
        :raises ValueError: it does not; says why.
    :param signer: the trainer's identity; None: it signs nothing, and takes what is not sealed.
    :param devices: client → public key of its device; others may not give. None: with ``signer`` None, everybody may.
    :param numbers: labels are numbers, not classes.
    :param on_news: called when there are other examples than before, with a line for the log.
    :param place: where large batches grow.
    """

    def __init__(
        self,
        job: str,
        examples: ExampleStore,
        fits: Callable[[Example], None],
        *,
        signer: Signer | None = None,
        devices: Mapping[str, bytes] | None = None,
        numbers: bool = False,
        on_news: Callable[[str, dict[str, Any]], None] = lambda what, told: None,
        place: Place | None = None,
    ) -> None:
        self.job, self.examples, self.devices, self.numbers = job, examples, devices, numbers
        self.gifts: dict[str, Gift] = {}
        self.garbage = 0
        """Messages that were none, or not of who should have said them."""
        self.passed_over = 0
        self._fits, self._signer, self._on_news = fits, signer, on_news
        self._uploads = Uploads(2 * pool_wire.MOST + _ROOM, Place() if place is None else place)
        self._queue: deque[tuple[str, bytes | Withdrawal]] = deque()
        self._waiting = 0
        self._busy: tuple[str, Batch | Withdrawal] | None = None
        self._said = 0
        self._opener: Any = None
        if signer is not None:
            from nodes.privacy.keys import SEED, derive
            from nodes.privacy.sealing import Opener

            self._opener = Opener(derive(signer.private(), b"penstock|pool|opener", SEED))

    # -- the contract -----------------------------------------------------------------------------------------------

    def filters(self) -> tuple[str, ...]:
        return tuple(f"p/+/{what}" for what in ("up", "offer", "blob", "withdraw"))

    def start(self, kept: Mapping[str, Any], now: int) -> Answer:
        out = Answer()
        for key in kept:
            if key.startswith("gift/"):
                self.gifts[key.removeprefix("gift/")] = Gift(**kept[key])
        self._open(now, out)
        return out

    def heard(self, topic: str, payload: bytes, now: int) -> Answer:
        out = Answer()
        parts = topic.split("/")
        if len(parts) != 3:
            return out
        client, what = parts[1], parts[2]
        try:
            if what == "up":
                self._put(client, payload)
            elif what == "offer":
                self._offered(client, wire.hear(wire.Parcel, payload), now, out)
            elif what == "blob":
                self._grown(client, *self._uploads.took(client, payload, now), out)
            elif what == "withdraw":
                self._withdrawn(client, topic, payload, out)
        except PayloadError:
            self.garbage += 1
        except BlobError:
            pass  # it is gone from the disk; the client offers it again
        self._go(now, out)
        return out

    def worked(self, name: str, result: Any, now: int) -> Answer:
        out = Answer()
        busy, self._busy = self._busy, None
        if busy is not None:
            client, said = busy
            if isinstance(result, _Took):
                self._took(result, out)
            elif isinstance(result, _Forgot):
                self._forgot(result, out)
            elif isinstance(result, RefusedError) and isinstance(said, Batch):
                self._answer(client, said.life, said.number, REFUSED, out, result.reason, str(result))
                self._on_news("a batch was refused", {"client": client, "reason": f"{result.reason}: {result}"[:300]})
            else:  # a disk that is full: nothing is said, and it comes again
                self._on_news("a batch was not kept", {"client": client, "reason": f"{result}"[:300]})
        self._go(now, out)
        return out

    def linked(self, now: int) -> Answer:
        out = Answer()
        self._open(now, out)
        return out

    def wake(self) -> int | None:
        at = self._uploads.wake()
        return self._said + PULSE if at is None else min(at, self._said + PULSE)

    def tick(self, now: int) -> Answer:
        out = Answer()
        if now >= self._said + PULSE:
            self._open(now, out)
        for client, said in self._uploads.due(now):
            out.say.append(Say(f"p/{client}/have", said))
        self._go(now, out)
        return out

    def shut(self, now: int) -> Answer:
        """The job is over: nothing more is taken."""
        out = Answer(over=True)
        self._open(now, out, closed=True)
        return out

    def _open(self, now: int, out: Answer, *, closed: bool = False) -> None:
        """Say that there is a pool, or none any more."""
        self._said = now
        said = pool_wire.say(Opened(self.job, b"" if self._opener is None else self._opener.public, closed))
        out.say.append(Say("pool", pool_wire.sign(self._signer, self.job, "pool", said), retain=True))

    # -- what is heard ----------------------------------------------------------------------------------------------

    def _put(self, client: str, said: bytes | Withdrawal) -> None:
        """Have it opened when its turn comes; of a client at most one batch waits."""
        size = len(said) if isinstance(said, bytes) else 0
        waits = any(other == client and isinstance(each, bytes) for other, each in self._queue)
        if size and (waits or self._waiting + size > QUEUE):
            self.passed_over += 1
            return
        self._waiting += size
        self._queue.append((client, said))

    def _offered(self, client: str, parcel: wire.Parcel, now: int, out: Answer) -> None:
        """A batch that is larger than a message; what is known of it is not fetched."""
        try:
            if self._known(client, parcel.run, parcel.round):
                self._answer(client, parcel.run, parcel.round, TAKEN, out)
                return
            if self.devices is not None and client not in self.devices:
                raise RefusedError("unknown", f"no key of {client[:64]!r} is known")
            self._grown(client, *self._uploads.offered(client, parcel, now), out)
        except RefusedError as error:
            self._answer(client, parcel.run, parcel.round, REFUSED, out, error.reason, str(error))
        except BlobError as error:
            self._answer(client, parcel.run, parcel.round, REFUSED, out, error.reason, str(error))

    def _grown(self, client: str, said: bytes | None, whole: bytes | None, out: Answer) -> None:
        if said is not None:
            out.say.append(Say(f"p/{client}/have", said))
        if whole is not None:
            self._put(client, whole)

    def _withdrawn(self, client: str, topic: str, payload: bytes, out: Answer) -> None:
        public = None if self.devices is None else self.devices.get(client, b"")
        message = Ear(self.job, public).hear(topic, payload)
        said = None if message is None else pool_wire.hear(Withdrawal, message)
        if said is None or said.job != self.job:
            self.garbage += 1
            return
        gift = self.gifts.get(client, Gift())
        if said.until <= gift.until or said.until < gift.life:  # it was done, or there was a newer consent since
            self._answer(client, said.until, 0, WITHDRAWN, out)
        elif not any(other == client and each == said for other, each in self._queue):
            self._uploads.forget(client)
            self._put(client, said)

    def _known(self, client: str, life: int, number: int) -> bool:
        gift = self.gifts.get(client)
        return gift is not None and gift.life == life and number <= gift.upto

    # -- opening ----------------------------------------------------------------------------------------------------

    def _go(self, now: int, out: Answer) -> None:
        """Begin with the next in the queue."""
        while self._busy is None and self._queue:
            client, said = self._queue.popleft()
            if isinstance(said, Withdrawal):
                self._busy = (client, said)
                out.work = Work("forget", partial(self._forget, client, said.until))
                return
            self._waiting -= len(said)
            try:
                batch = pool_wire.hear(Batch, said)
            except PayloadError:
                self.garbage += 1
                continue
            try:
                if self._known(client, batch.life, batch.number):
                    self._answer(client, batch.life, batch.number, TAKEN, out)
                    continue
                self._admit(client, batch)
            except RefusedError as error:
                self._answer(client, batch.life, batch.number, REFUSED, out, error.reason, str(error))
                continue
            self._busy = (client, batch)
            out.work = Work("open", partial(self._take, client, batch))

    def _admit(self, client: str, batch: Batch) -> None:
        """Whether it may be opened.

        :raises RefusedError: no.
        """
        gift = self.gifts.get(client, Gift())
        if batch.job != self.job:
            raise RefusedError("job", f"a batch of job {batch.job[:64]!r}")
        if self.devices is not None and client not in self.devices:
            raise RefusedError("unknown", f"no key of {client[:64]!r} is known")
        if batch.sealed != (self._opener is not None):
            raise RefusedError(
                "plain", "it is not sealed" if not batch.sealed else "it is sealed, and there is no key here"
            )
        if batch.life <= gift.until:
            raise RefusedError("withdrawn", "it was given under a consent that is withdrawn")
        if batch.life < gift.life or batch.number < 1:
            raise RefusedError("stale", "there is a later consent")

    def _take(self, client: str, batch: Batch) -> _Took:
        """In the thread: the examples of a batch into the store.

        :raises RefusedError: it does not count.
        :raises SinkAwayError: the disk is full or away.
        """
        data = batch.data
        if self._opener is not None:
            from nodes.privacy.keys import SealError

            known = (self.devices or {}).get(client, b"")
            try:
                data = self._opener.open(data, pool_wire.about(self.job, client, batch.life, batch.number), known)
            except SealError as error:
                raise RefusedError("seal", str(error)) from None
        try:
            found = pool_wire.unpack(data, client, numbers=self.numbers)
            for example in found:
                self._fits(example)
            self.examples.add(found)
        except PayloadError as error:
            raise RefusedError(error.reason, error.detail) from None
        except (MisshapenError, ValueError) as error:
            raise RefusedError("form", str(error)[:300]) from None
        return _Took(client, batch, len(found))

    def _forget(self, client: str, until: int) -> _Forgot:
        """In the thread.

        :raises SinkAwayError: the disk is full or away.
        """
        return _Forgot(client, until, self.examples.remove(f"{client}/"))

    # -- what became of it ------------------------------------------------------------------------------------------

    def _took(self, result: _Took, out: Answer) -> None:
        client, batch = result.client, result.batch
        gift = self.gifts.setdefault(client, Gift())
        if batch.life != gift.life:
            gift.life, gift.examples = batch.life, 0
        gift.upto, gift.examples = batch.number, gift.examples + result.examples
        out.commit[f"gift/{client}"] = asdict(gift)
        self._answer(client, batch.life, batch.number, TAKEN, out)
        self._on_news("", {})

    def _forgot(self, result: _Forgot, out: Answer) -> None:
        gift = self.gifts[result.client] = Gift(until=result.until)
        out.commit[f"gift/{result.client}"] = asdict(gift)
        self._answer(result.client, result.until, 0, WITHDRAWN, out)
        self._on_news("consent withdrawn, examples forgotten", {"client": result.client, "examples": result.examples})

    def _answer(
        self, client: str, life: int, number: int, status: str, out: Answer, reason: str = "", detail: str = ""
    ) -> None:
        topic = f"p/{client}/ack"
        said = pool_wire.say(pool_wire.Answer(life, number, status, reason, detail[:300]))
        out.say.append(Say(topic, pool_wire.sign(self._signer, self.job, topic, said)))
