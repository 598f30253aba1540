"""The update that a client made last, until it is known what became of it; and what the client carries from round to round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from broker.blobs import Pace
from nodes.federated import wire
from nodes.federated.local import Memory, Trained
from nodes.federated.machine import Answer, Say
from nodes.federated.uploads import Upload


class Post:
    """One client's.

    :param name: of the client.
    :param inline: bytes of an update that still travels in one message; ``chunk``: of a larger one's pieces.
    :param sign: (topic, payload) → the payload as it travels there.
    :ivar memory: what counts when it trains next.
    :ivar number: the round of the update; 0: there is none.
    :ivar answer: what became of it; empty: not known.
    """

    def __init__(
        self, name: str, inline: int, chunk: int, sign: Callable[[str, bytes], bytes] = lambda _, payload: payload
    ) -> None:
        self._sign = sign
        self.memory = Memory.of(None)
        self.number = 0
        self.answer = ""
        self._inline, self._chunk, self._name = inline, chunk, name
        self._payload = b""
        self._next: Memory | None = None
        self._asked = 0
        self._upload: Upload | None = None
        self._pace: Pace | None = None

    @property
    def open(self) -> bool:
        """There is an update, and no answer."""
        return bool(self.number and not self.answer)

    def resume(self, kept: Mapping[str, Any]) -> None:
        """From what was committed."""
        self.memory = Memory.of(kept.get("memory"))
        if (sent := kept.get("sent")) is not None:
            self.number, self._payload = sent["round"], sent["payload"]
            self._next = None if sent["memory"] is None else Memory.of(sent["memory"])

    def forget(self, out: Answer) -> None:
        """All of it was of another run."""
        self.memory = Memory.of(None)
        self._clear()
        out.commit.update({"sent": None, "memory": None})

    def put(self, number: int, made: Trained, out: Answer) -> None:
        """An update was made; the one before is of no interest any more."""
        self._next = made.memory if made.memory or self.memory else None
        self.number, self._payload, self.answer, self._upload = number, made.payload, "", None
        kept = None if self._next is None else self._next.kept()
        out.commit["sent"] = {"round": number, "payload": made.payload, "memory": kept}

    # -- on its way -------------------------------------------------------------------------------------------------

    def say(self, run: int, now: int, out: Answer) -> None:
        """The update, or that there is one."""
        if not self.number:
            return
        if len(self._payload) <= self._inline:
            self._say("up", self._payload, out)
            return
        if self._upload is None:
            self._upload = Upload(run, self.number, self._payload, self._chunk, now, self._pace)
            self._pace = self._upload.pace
        else:
            self._upload.again(now)
        self._say("offer", wire.say(self._upload.parcel), out)
        self.chunks(now, out)

    def have(self, payload: bytes, now: int, out: Answer) -> None:
        """The coordinator said which chunks are there."""
        if self._upload is not None:
            self._upload.heard(payload, now)
            self.chunks(now, out)

    def chunks(self, now: int, out: Answer) -> None:
        """Those that are to be sent now."""
        if self._upload is not None:
            for chunk in self._upload.chunks(now):
                self._say("blob", chunk, out)

    def linked(self, now: int) -> None:
        """The link was lost and is there again."""
        if self._upload is not None:
            self._upload.linked(now)

    def wake(self) -> int | None:
        """When :meth:`chunks` has something."""
        return None if self._upload is None else self._upload.wake()

    def _say(self, topic: str, payload: bytes, out: Answer) -> None:
        topic = f"c/{self._name}/{topic}"
        out.say.append(Say(topic, self._sign(topic, payload)))

    def doubt(self) -> bool:
        """The coordinator is another than the one that answered. It says anew what it has taken, unless it lost that; True: there
        was no answer yet.
        """
        unheard, self.answer = not self.answer, ""
        return unheard

    def drop(self, out: Answer) -> None:
        """It was never asked for, as it turns out."""
        self._clear()
        out.commit["sent"] = None

    # -- what became of it ------------------------------------------------------------------------------------------

    def heard(self, ack: wire.Ack) -> bool:
        """An answer; True: it is news. What was taken stays so."""
        if ack.round != self.number or self.answer in {ack.status, wire.TAKEN}:
            return False
        self.answer, self._upload = ack.status, None
        return True

    def settled(self, call: wire.Call, out: Answer) -> bool:
        """Decide which memory counts before training for that call; False: what became of the update has to be known first."""
        if not self.number:
            return True
        if call.open and not self.answer:
            return False  # it is still wanted, and said again until it is answered
        if self._next is not None and self.number not in call.aborted:
            if not self.answer:
                return False
            if self.answer == wire.TAKEN:
                self.memory = self._next
                out.commit["memory"] = self.memory.kept()
        self._clear()
        out.commit["sent"] = None
        return True

    def _clear(self) -> None:
        self.number, self._payload, self.answer = 0, b"", ""
        self._next = self._upload = None

    def ask(self, out: Answer, *, again: bool = False) -> bool:
        """Ask what became of it; once, or ``again``."""
        if self._next is None or (self._asked == self.number and not again):
            return False
        self._asked = self.number
        self._say("ask", wire.say(wire.Ask(answer=self.number)), out)
        return True
