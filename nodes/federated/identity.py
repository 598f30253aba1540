"""Who said it: what each side of a job signs and seals, and what it believes. Without keys everything passes as it is.

What the coordinator says is signed with its key, and bound to the job and the topic, so that an answer to one client is none to
another. What a client says of itself is signed with the device's key in the same way; its updates are sealed to the coordinator
(:mod:`nodes.privacy.sealing`) for one run and one round. Chunks of blobs are not signed: they are held against a digest that is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from nodes.federated import wire
from nodes.federated.intake import RefusedError
from nodes.federated.local import Trained
from nodes.federated.machine import Answer
from nodes.federated.trust import ClientTrust, CoordinatorTrust

if TYPE_CHECKING:
    from nodes.privacy.keys import Signer
    from nodes.privacy.sealing import Opener

UNPROVEN = frozenset({"unsigned", "unsealed", "signature"})
"""Reasons why an update is not known to be its client's: they say nothing against that client, in whose name anybody may have
spoken, and nothing about the update that it did send."""

_OURS = frozenset({"round", "model", "ack", "have"})
"""Last levels of topics on which a coordinator's word has to be signed."""
_THEIRS = frozenset({"state", "offer", "ask"})
"""Last levels of topics on which a client's word has to be signed."""
_TOLD = 20
"""Different things that are told, at most: names are others' choice."""


class _Tale:
    """What a person should know, each thing once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def once(self, out: Answer, text: str) -> None:
        if text not in self._told and len(self._told) < _TOLD:
            self._told.add(text)
            out.tell.append(text)


class Ear:
    """Believes one speaker of a job.

    :param public: the speaker's key (Ed25519, 32 bytes); None: everybody is believed.
    """

    def __init__(self, job: str, public: bytes | None) -> None:
        self._job, self._public = job, public

    def hear(self, topic: str, payload: bytes) -> bytes | None:
        """The message, without its signature; None: it is not the speaker's, or was said on another topic."""
        signed = wire.signed(payload)
        if self._public is None:
            return payload if signed is None else signed.message
        if signed is None or not proven(self._public, self._job, topic, signed):
            return None
        return signed.message


def proven(public: bytes, job: str, topic: str, signed: wire.Signed) -> bool:
    """Whether the owner of ``public`` said that on that topic of that job."""
    from nodes.privacy.keys import SealError, verify

    try:
        verify(public, f"{job}/{topic}", signed.message, signed.signature)
    except SealError:
        return False
    return True


def _sign(signer: Signer, job: str, topic: str, payload: bytes) -> bytes:
    return wire.say(wire.Signed(signer.sign(f"{job}/{topic}", payload), payload))


def _about(job: str, run: int, number: int, client: str) -> bytes:
    return msgspec.msgpack.encode(["fl-update", job, run, number, client])


class Member:
    """A client's part.

    :ivar passed_over: messages that the coordinator did not sign, though its key is known.
    """

    def __init__(self, job: str, name: str, trust: ClientTrust) -> None:
        self.trust = trust
        self.passed_over = 0
        self._job, self._name = job, name
        self._ear = Ear(job, trust.coordinator)
        self._tale = _Tale()

    def heard(self, topic: str, payload: bytes, out: Answer) -> bytes | None:
        """What arrived, without its signature; None: it is to be passed over."""
        if topic.rpartition("/")[2] not in _OURS:
            signed = wire.signed(payload)
            return payload if signed is None else signed.message
        if (message := self._ear.hear(topic, payload)) is None:
            self.passed_over += 1
            what = topic.rpartition("/")[2]
            self._tale.once(out, f"passed over on {what!r}: not signed by the coordinator whose key is known here")
        return message

    def say(self, topic: str, payload: bytes) -> bytes:
        """As it travels on that topic of the job."""
        if self.trust.signer is None or topic.rpartition("/")[2] not in _THEIRS:
            return payload
        return _sign(self.trust.signer, self._job, topic, payload)

    def closed(self, call: wire.Call, act: Callable[[], Trained]) -> Callable[[], Trained]:
        """The training ``act``, with its update signed, and sealed where the call has a key for that."""
        signer, topic = self.trust.signer, f"c/{self._name}/up"
        if signer is None:
            return act

        def closed() -> Trained:
            made = act()
            if not call.seal:
                return replace(made, payload=_sign(signer, call.job, topic, made.payload))
            from nodes.privacy.sealing import seal_for

            about = _about(call.job, call.run, call.round, self._name)
            box = seal_for(call.seal, made.payload, about, signer)
            sealed = wire.Sealed(call.run, call.round, signer.public, box)
            return replace(made, payload=wire.say(sealed))

        return closed

    def doubted(self, ack: wire.Ack, out: Answer) -> bool:
        """Whether the coordinator answered that an update in our name was not ours: ours is still wanted."""
        if ack.status != wire.REFUSED or ack.reason not in UNPROVEN:
            return False
        self._tale.once(out, f"the coordinator refused an update in our name ({ack.reason}): {ack.detail}")
        return True


class Leader:
    """A coordinator's part.

    :ivar seal: the key to which updates are sealed (X25519), said in every call; empty: they are not.
    :ivar passed_over: messages of clients that their devices did not sign, though their keys are known.
    """

    def __init__(self, job: str, trust: CoordinatorTrust) -> None:
        self.trust = trust
        self.passed_over = 0
        self._job = job
        self._tale = _Tale()
        self._opener: Opener | None = None
        self.seal = b""
        if trust.signer is not None:
            from nodes.privacy.keys import SEED, derive
            from nodes.privacy.sealing import Opener

            self._opener = Opener(derive(trust.signer.private(), b"penstock|federate|opener", SEED))
            self.seal = self._opener.public
        self._self = Ear(job, None if trust.signer is None else trust.signer.public)

    def knows(self, client: str) -> bool:
        """Whether that client may take part."""
        return self.trust.devices is None or client in self.trust.devices

    def say(self, topic: str, payload: bytes) -> bytes:
        """As it travels on that topic of the job."""
        if self.trust.signer is None or topic.startswith("blob/"):
            return payload
        return _sign(self.trust.signer, self._job, topic, payload)

    def heard(self, topic: str, payload: bytes, out: Answer) -> bytes | None:
        """What arrived, without its signature; None: it is to be passed over."""
        what = topic.rpartition("/")[2]
        if topic == "round":
            message = self._self.hear(topic, payload)
            why = "somebody else calls rounds of this job: passed over, and our call is said again"
        elif what == "up":
            return payload  # update() looks at it, and has an answer
        elif self.trust.devices is None or what not in _THEIRS or topic.count("/") != 2:
            signed = wire.signed(payload)
            return payload if signed is None else signed.message
        else:
            client = topic.split("/")[1]
            known = self.trust.devices.get(client)
            message = None if known is None else Ear(self._job, known).hear(topic, payload)
            why = "no key of it is known" if known is None else "not signed with the key that is known"
            why = f"client {client[:64]!r} is not believed: {why}"
        if message is None:
            self.passed_over += 1
            self._tale.once(out, why)
        return message

    def update(self, client: str, payload: bytes, run: int) -> bytes:
        """The ``update/1`` that a client sent, opened.

        :raises RefusedError: ``unsigned``, ``unsealed``, ``signature``, ``unknown-client``, ``sealed`` or ``job``.
        """
        devices = self.trust.devices
        if devices is not None and client not in devices:
            raise RefusedError("unknown-client", f"no key of {client[:64]!r} is known")
        if (sealed := wire.sealed(payload)) is not None:
            return self._open(client, sealed, run)
        signed = wire.signed(payload)
        if devices is None:
            return payload if signed is None else signed.message
        if self._opener is not None:
            raise RefusedError("unsealed" if signed is not None else "unsigned", "it is not sealed to this coordinator")
        if signed is None:
            raise RefusedError("unsigned", "it is not signed")
        if not proven(devices[client], self._job, f"c/{client}/up", signed):
            raise RefusedError("signature", f"it is not signed with the key of {client} that is known")
        return signed.message

    def _open(self, client: str, sealed: wire.Sealed, run: int) -> bytes:
        from nodes.privacy.keys import SealError

        if self._opener is None:
            raise RefusedError("sealed", "it is sealed, and this coordinator has no key")
        if sealed.run != run:
            raise RefusedError("job", "an update of another run")
        by = sealed.by if self.trust.devices is None else self.trust.devices[client]
        try:
            return self._opener.open(sealed.box, _about(self._job, run, sealed.round, client), by)
        except SealError as error:
            raise RefusedError("signature", str(error)) from None
