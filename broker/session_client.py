"""What the two networked clients have in common: staying connected, publishing in order, keeping subscriptions."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence

import mqtt5

from broker.backoff import Backoff
from broker.bus import Bus, Overflow, Publication, Receipt
from broker.session_dial import SilentError, words
from broker.session_inbox import Filter, Inbox, SessionSubscription
from broker.session_names import filter_fault
from broker.session_options import Address, Options, parse
from broker.session_outbox import TURN, Batch, Outbox
from schemas.errors import BusError, ClosedError, ConnectError, DeniedError

ORPHANS = 30.0
"""Seconds after connecting in which a resumed session's messages wait for somebody to subscribe to them."""
SILENT = 3
"""Connections closed without an answer that make it likely that the broker does not know our protocol."""
FAREWELL = 2.0
"""Seconds that closing waits for the last bytes to go out."""


class Client(Bus):
    """A bus with one link that may be lost.

    After the first connection every loss and refusal is met with another attempt, for ever: nobody is on site. Each is
    told to ``options.on_state``.

    :param url: see :func:`broker.session_options.parse`.
    :param impatient: give up the first connection where the broker has closed :data:`SILENT` times without an answer.
    :raises ConfigError: not such a URL.
    """

    _inbox: Inbox
    _outbox: Outbox

    def __init__(self, url: str | Address, options: Options | None = None, *, impatient: bool = False) -> None:
        self.address = parse(url) if isinstance(url, str) else url
        self.options = (options or Options()).signed_in(self.address)
        self.client_id = self.options.client_id
        self._impatient = impatient
        self._order = asyncio.Lock()
        self._ending: dict[str, asyncio.Future[None]] = {}  # filters the broker is still to forget
        self._keeper: asyncio.Task[None] | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._closed = False
        self._fresh = self.options.fresh

    # what differs

    @abstractmethod
    async def _dial(self, left: float) -> asyncio.Future[None]:
        """One attempt to connect, of at most ``left`` seconds; attached on return.

        :returns: done when the link is lost.
        :raises ConnectError: refused or not reached.
        """

    @abstractmethod
    def _why(self) -> str:
        """Why the link was lost."""

    @abstractmethod
    def _goodbye(self) -> None:
        """Write what is accepted and a DISCONNECT; without a link nothing."""

    @abstractmethod
    async def _hang_up(self) -> None:
        """Wait until the link is gone, for at most :data:`FAREWELL` seconds; then make it so."""

    @abstractmethod
    def _ask(self, found: Filter) -> None:
        """Subscribe at the broker, if there is a link; the answer goes to :meth:`_subscribed`."""

    @abstractmethod
    def _leave(self, pattern: str) -> None:
        """Unsubscribe at the broker, if there is a link; the answer goes to :meth:`_left`."""

    # life

    async def open(self) -> None:
        if self._closed:
            raise ClosedError("the bus is closed")
        if self._keeper is not None:
            raise BusError("the bus is open already")
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.create_task(self._keep(first))
        try:
            await asyncio.wait([first, self._keeper], return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                self._keeper.result()
            first.result()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        self._closed = True
        keeper = self._keeper
        self._goodbye()
        self._detach()
        self._outbox.close()
        for subscription in self._inbox.subscriptions:
            subscription.end()
        for found in self._inbox.filters.values():
            if not found.answer.done():
                found.answer.set_exception(ClosedError("the bus was closed"))
                found.answer.exception()  # seen: there may be nobody who waits for it
        self._inbox.filters.clear()
        try:
            await self._hang_up()
        finally:
            if keeper is not None and not keeper.done():
                keeper.cancel()
                await asyncio.wait([keeper])

    async def _keep(self, first: asyncio.Future[None]) -> None:
        """Connect, and again after each loss, until closed."""
        loop, options = asyncio.get_running_loop(), self.options
        deadline = loop.time() + options.patience
        backoff, silent = Backoff(options.backoff, options.max_backoff, loop.time()), 0
        refusal: ConnectError | None = None
        while True:
            try:
                left = options.timeout if first.done() else deadline - loop.time()
                lost = await self._dial(min(left, options.timeout))
            except ConnectError as error:
                silent = silent + 1 if isinstance(error, SilentError) else 0
                pause = backoff.failed(loop.time())
                tired = error.permanent or (self._impatient and silent >= SILENT) or loop.time() + pause >= deadline
                if tired and not first.done():
                    if refusal is not None and not error.permanent and not isinstance(error, SilentError):
                        error = (
                            refusal  # the last attempt had little time: no answer says less than what the broker said
                        )
                    first.set_exception(error)
                    return
                refusal = error if error.code is not None else refusal
                options.report("disconnected", str(error))
            else:
                since = loop.time()
                if not first.done():
                    first.set_result(None)
                await asyncio.wait([lost])  # not awaited itself: our cancellation is not its
                self._detach()
                if self._closed:
                    break
                options.report("disconnected", self._why())
                pause = backoff.lost(loop.time() - since, loop.time())
            await asyncio.sleep(pause)

    def _attached(self, *, resumed: bool) -> None:
        """There is a link: subscribe again, forget what is to be forgotten. Sending again is the caller's, after this."""
        for found in tuple(self._inbox.filters.values()):
            if not resumed or not found.answer.done():
                self._ask(found)
        for pattern in tuple(self._ending):
            self._leave(pattern)
        if resumed:
            loop = asyncio.get_running_loop()
            self._timers["orphans"] = loop.call_later(ORPHANS, self._refuse_orphans)

    def _detach(self) -> None:
        """The link is gone. Called again without harm."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for ended in self._ending.values():
            if not ended.done():
                ended.set_result(None)
        self._inbox.detach()
        self._outbox.detach()

    def _refuse_orphans(self) -> None:
        if count := self._inbox.refuse_orphans():
            self.options.report("orphaned", f"{count} messages of the resumed session that nobody subscribed to")

    # sending

    async def publish(self, publications: Sequence[Publication]) -> Receipt:
        loop, outbox = asyncio.get_running_loop(), self._outbox
        receipt: Receipt = loop.create_future()
        size = len(publications)
        if not size:
            receipt.set_result(None)
            return receipt
        batch, sent = Batch(receipt, size), 0
        if outbox.ready and not self._order.locked() and outbox.since_turn < TURN:
            sent = outbox.write(publications, 0, batch)
            if sent == size:
                return receipt
        try:
            async with self._order:
                while sent < size:
                    if self._closed:
                        raise ClosedError("the bus is closed")
                    if outbox.since_turn >= TURN:
                        outbox.since_turn = 0
                        await asyncio.sleep(0)
                    if outbox.ready:
                        before, sent = sent, outbox.write(publications, sent, batch)
                        if sent > before:
                            continue
                    await outbox.wait()
        except BaseException:
            receipt.cancel()  # those accepted so far are on their way; nobody will ask
            raise
        return receipt

    # subscribing

    async def subscribe(
        self,
        filters: Sequence[str],
        *,
        qos: int = 1,
        capacity: int = 1024,
        overflow: Overflow = "block",
        group: str | None = None,
        retained: bool = True,
    ) -> SessionSubscription:
        if self._closed:
            raise ClosedError("the bus is closed")
        for topic in filters:
            if text := filter_fault(topic, group):
                raise DeniedError(topic, mqtt5.SubAckReasonCode.TOPIC_FILTER_INVALID.value, text)
        subscription = SessionSubscription(self._inbox, self._unsubscribe, capacity, overflow)
        found = [self._inbox.add(subscription, topic, group, qos, retained) for topic in filters]
        try:
            for each in found:
                self._ending.pop(each.pattern, None)
                if self.connected:
                    self._ask(each)
            self._inbox.adopt(subscription)
            for each in found:
                code = await asyncio.shield(each.answer)
                if code >= 128:
                    raise _denied(each.pattern, code)
        except BaseException:
            subscription.end()
            for unused in self._inbox.remove(subscription):
                answer = unused.answer
                if not answer.done() or (answer.exception() is None and answer.result() < 128):
                    self._forget(unused.pattern)
            raise
        self._inbox.start(subscription)
        return subscription

    async def _unsubscribe(self, subscription: SessionSubscription) -> None:
        unused = self._inbox.remove(subscription)
        subscription.end()
        ended = [self._forget(found.pattern) for found in unused]
        if self.connected:
            for each in ended:
                await asyncio.shield(each)

    def _subscribed(self, found: Filter, code: int) -> None:
        if not found.answer.done():
            found.answer.set_result(code)
        elif code >= 128:  # granted once, refused after a reconnect
            for subscription in tuple(found.subscriptions):
                subscription.end(_denied(found.pattern, code))
                for unused in self._inbox.remove(subscription):
                    self._forget(unused.pattern)

    def _forget(self, pattern: str) -> asyncio.Future[None]:
        """Unsubscribe at the broker, now or after the next reconnect."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.connected or self.options.session_expiry:
            self._ending[pattern] = ended
            self._leave(pattern)
        else:
            ended.set_result(None)
        return ended

    def _left(self, pattern: str) -> None:
        ended = self._ending.pop(pattern, None)
        if ended is not None and not ended.done():
            ended.set_result(None)


def _denied(pattern: str, code: int) -> DeniedError:
    try:
        reason = words(mqtt5.SubAckReasonCode(code))
    except ValueError:
        reason = "unspecified error"
    return DeniedError(pattern, code, reason)
