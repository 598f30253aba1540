"""A client's side of secure sums: its keys, the shares of its secrets, its masked update, and what takes masks off the sum.

What it must remember is committed before anything is said that follows of it, so that a client that was killed says the same
again; it never masks two updates with the same masks, nor gives back both shares of one client. While the sum is being prepared,
it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nodes.federated import wire
from nodes.federated.local import Shaped, Trained
from nodes.federated.machine import Answer, Say, Work
from nodes.federated.rules import SECOND
from nodes.federated.trust import ClientTrust
from nodes.privacy.secure_sum import Client, SecureSumError
from nodes.privacy.secure_terms import Inbox, hear, terms_of
from schemas.errors import ConfigError, PenstockError

_FIRST, _LAST = SECOND, 30 * SECOND
"""Pauses between repetitions of a step that nothing followed: doubled from the first to the last."""
_PASSED_OVER = frozenset({"garbled", "signature", "early", "both"})
"""Reasons for which a message is nothing to us, and the sum goes on; anything else ends our part in it."""

Sign = Callable[[str, bytes], bytes]
"""What is said, as it travels on a topic."""


class SecurePart:
    """One client's part in the secure sum of the round under way.

    :param size: numbers of its updates.
    :param sign: what is said, as it travels on a topic (:meth:`nodes.federated.identity.Member.say`).
    :param least: fewest clients of a sum that it takes part in.
    :ivar shaped: the update, trained and not masked yet.
    :ivar clipped: how many numbers of the last update were cut to the round's ``clip``.
    """

    def __init__(self, job: str, name: str, size: int, trust: ClientTrust, least: int, sign: Sign) -> None:
        self.job, self.name, self.size, self.trust, self.least = job, name, size, trust, least
        self._sign = sign
        self.shaped: Shaped | None = None
        self.clipped = 0
        self._sum: Client | None = None
        self._at: int | None = None
        self._pause = _FIRST
        self._run = self._round = self._epoch = 0
        self._revealed = self._masked = False
        self._terms: dict[str, Any] = {}
        self._said: tuple[str, bytes] = ("", b"")
        self._inbox = self._survivors = b""

    # -- what is kept -----------------------------------------------------------------------------------------------

    def resume(self, kept: Mapping[str, Any], now: int, out: Answer) -> None:
        """Go on with what was committed."""
        if (saved := kept.get("secure")) is None:
            return
        self._run, self._round, self._epoch = saved["run"], saved["round"], saved["epoch"]
        self._revealed = saved["revealed"]
        if "snapshot" not in saved:
            return
        self._terms, self._masked, self._survivors = dict(saved["terms"]), saved["masked"], saved["survivors"]
        self._said = saved["what"], saved["body"]
        try:
            self._open(saved["snapshot"])
        except PenstockError:  # it has other keys than it had, or knows others
            self.forget(out)
            return
        self.again(now, out)

    def _commit(self, out: Answer) -> None:
        kept: dict[str, Any] = {
            "run": self._run,
            "round": self._round,
            "epoch": self._epoch,
            "revealed": self._revealed,
        }
        if self._sum is not None:
            kept |= {
                "terms": self._terms,
                "snapshot": self._sum.snapshot(),
                "what": self._said[0],
                "body": self._said[1],
            }
            kept |= {"masked": self._masked, "survivors": self._survivors}
        out.commit["secure"] = kept

    def forget(self, out: Answer) -> None:
        """The round is over, or it is out of the sum: no secret of it is kept."""
        if self._sum is not None:
            self._close()
            self._commit(out)

    def _close(self) -> None:
        self._sum = self.shaped = self._at = None
        self._masked, self._inbox, self._survivors, self._said = False, b"", b"", ("", b"")

    def _open(self, kept: bytes) -> None:
        trust = self.trust
        terms = terms_of(self.job, self._round, self._terms)
        if terms.size != self.size:
            raise ConfigError(f"a sum of {terms.size} numbers; the model has {self.size}")
        self._sum = Client(
            self.name,
            terms,
            signer=trust.signer,
            coordinator=trust.coordinator,
            devices=trust.devices,
            least=self.least,
            kept=kept,
        )

    # -- what is asked ----------------------------------------------------------------------------------------------

    def joins(self, call: wire.Call) -> bool:
        """Whether a sum is called that it has no part in yet, and may."""
        if not call.secure or call.phase != wire.KEYS:
            return False
        return call.run != self._run or (call.round, call.secure.get("epoch", 0)) > (self._round, self._epoch)

    def anew(self, call: wire.Call) -> bool:
        """Whether a round that it knows is called under other terms: the coordinator's machine lost its last moments."""
        return bool(self._another(call) and (call.run, call.round) == (self._run, self._round))

    def _another(self, call: wire.Call) -> bool:
        return bool(call.secure) and call.secure.get("epoch") != self._epoch

    def trains(self, call: wire.Call) -> bool:
        """Whether an update for that call is to be made."""
        return self._of(call) and self.shaped is None and not self._masked

    def _of(self, call: wire.Call) -> bool:
        here = self._sum is not None and (call.run, call.round) == (self._run, self._round)
        return here and bool(call.secure) and not self._another(call)

    def called(self, call: wire.Call, now: int, out: Answer, *, newer: bool) -> None:
        """What is asked now.

        :param newer: by a coordinator that was away.
        """
        if self._sum is None:
            return
        if not self._of(call):
            self.forget(out)
        elif newer:
            self.again(now, out)

    def join(self, call: wire.Call, now: int, out: Answer) -> None:
        """Take part.

        :raises PenstockError: not under these terms; or what computes masks is not installed.
        """
        if self.anew(call) and self._revealed:
            raise SecureSumError("both", "the sum of this round was given away already, and two sums say more than one")
        self._close()
        self._run, self._round, self._epoch = call.run, call.round, int(call.secure.get("epoch", 0))
        self._revealed, self._terms = False, dict(call.secure)
        try:
            self._open(b"")
            if self._sum is not None:
                self._step("key", self._sum.keys(), now, out)
        except PenstockError:
            self._sum = None
            self._commit(out)
            raise

    # -- what is heard ----------------------------------------------------------------------------------------------

    def heard(self, payload: bytes, now: int, out: Answer) -> str:
        """A step of the coordinator's; why our part in the sum is over, or empty.

        :raises PayloadError: it is none.
        """
        part = wire.hear(wire.Part, payload)
        if self._sum is None or (part.run, part.round, part.epoch) != (self._run, self._round, self._epoch):
            return ""
        try:
            match part.what:
                case "roster" if not self._inbox and not self._masked:
                    self._step("share", self._sum.share(part.body), now, out)
                case "inbox" if not self._inbox and not self._masked and self._said[0] == "share":
                    hear(part.body, Inbox, self.trust.coordinator)
                    self._inbox = part.body
                case "survivors" if self._masked:
                    self._heard_survivors(self._sum, part.body, now, out)
                case "agreements" if self._survivors:
                    self._reveal(self._sum, part.body, now, out)
                case "out":
                    self.forget(out)
                    return part.body.decode("utf-8", "replace")[:200]
        except SecureSumError as error:
            if error.reason not in _PASSED_OVER:
                self.forget(out)
                return f"{error.reason}: {error}"
        return ""

    def _heard_survivors(self, known: Client, body: bytes, now: int, out: Answer) -> None:
        if not known.terms.agreed:
            self._survivors = body
            self._reveal(known, b"", now, out)
        elif self._said[0] != "reveal":
            signed = known.agree(body)
            self._survivors = body
            self._step("agree", signed, now, out)

    def _reveal(self, known: Client, agreements: bytes, now: int, out: Answer) -> None:
        told = known.reveal(self._survivors, agreements)
        self._revealed = out.hard = True
        self._step("reveal", told, now, out)

    # -- masking ----------------------------------------------------------------------------------------------------

    def trained(self, call: wire.Call, shaped: Shaped) -> None:
        """The update is there."""
        if self.trains(call) and shaped.base == call.base:
            self.shaped = shaped

    def work(self, call: wire.Call, now: int) -> Work | None:
        """Masking, if everything is there for it."""
        if self._sum is None or self.shaped is None or not self._inbox or self._masked or not self._of(call):
            return None
        return Work("mask", partial(_mask, self._sum, self._inbox, self.shaped, call, self.name, now))

    def masked(self, call: wire.Call, now: int, out: Answer) -> bool:
        """The update is masked, and goes out with this answer; False: nobody waits for it any more."""
        if self._sum is None or not self._of(call):
            return False
        self.clipped = self._sum.clipped
        self._masked, self.shaped, self._inbox = True, None, b""
        self._said, self._pause, self._at = ("ask", b""), _FIRST, now + _FIRST
        self._commit(out)
        out.hard = True  # were it forgotten with the power, another vector could be masked likewise
        return True

    # -- what is said -----------------------------------------------------------------------------------------------

    def _step(self, what: str, body: bytes, now: int, out: Answer) -> None:
        self._said = what, body
        self._commit(out)
        self.again(now, out)

    def again(self, now: int, out: Answer) -> None:
        """Say the last step; and again after a while, if nothing follows."""
        self._pause = _FIRST
        self._say(now, out)

    def _say(self, now: int, out: Answer) -> None:
        if self._sum is None:
            return
        part = wire.Part(self._run, self._epoch, self._round, *self._said)
        topic = f"c/{self.name}/part"
        out.say.append(Say(topic, self._sign(topic, wire.say(part))))
        self._at = now + self._pause

    def wake(self) -> int | None:
        """When :meth:`tick` has something."""
        return self._at

    def tick(self, now: int, out: Answer) -> None:
        """What is due."""
        if self._at is not None and now >= self._at:
            self._pause = min(self._pause * 2, _LAST)
            self._say(now, out)


def _mask(known: Client, inbox: bytes, shaped: Shaped, call: wire.Call, name: str, time: int) -> Trained:
    """In the client's thread.

    :raises SecureSumError: the inbox is not for us, or has too few neighbours in it.
    :raises ConfigError: the update has numbers that are none.
    """
    vector = known.mask(inbox, shaped.values, shaped.samples)
    payload = wire.pack_update(
        call.job,
        call.run,
        call.round,
        name,
        base=known.terms.context.hex(),
        samples=1,
        packed={wire.MASKED_NUMBERS: vector},
        extra={},
        metrics={},
        time=time,
    )
    return Trained(payload, shaped.memory, shaped.samples)
