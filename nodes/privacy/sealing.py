"""An update on its way: signed by the device, and sealed so that only the coordinator reads it.

A sealed box: a key pair for this one message, X25519 with the coordinator's key, HKDF, AES-256-GCM. Who runs the broker sees
neither the numbers nor can he change them; the signature, inside of the box, says who sent them. Sender's and receiver's keys are
part of what the signature covers, so a box cannot be opened and sent on as meant for another.
"""

from __future__ import annotations

import msgspec

from nodes.privacy.keys import SEED, Pair, SealError, Signer, lock, seed, unlock, verify

_KEY = 32
_SIGNATURE = 64
_INFO = b"penstock|sealed"


class Opener:
    """The coordinator's key pair for receiving.

    :param secret: 16 bytes, kept by the coordinator; None: a new one.
    """

    def __init__(self, secret: bytes | None = None) -> None:
        self.secret = seed() if secret is None else secret
        if len(self.secret) != SEED:
            raise ValueError(f"{len(self.secret)} bytes; expected {SEED}")
        self._pair = Pair(self.secret, _INFO)

    @property
    def public(self) -> bytes:
        """32 bytes, for everybody."""
        return self._pair.public

    def open(self, box: bytes, about: bytes, sender: bytes) -> bytes:
        """What was sealed.

        :param about: what the box is of (job, round, client): as given to :func:`seal_for`.
        :param sender: the device's public key (Ed25519), known from elsewhere.
        :raises SealError: it is not for us, of another device, of something else, or changed.
        """
        if len(box) < _KEY:
            raise SealError("too short to be anything that was sealed")
        there = box[:_KEY]
        key = self._pair.agree(there, _bound(there, self.public))
        inside = unlock(key, box[_KEY:], about)
        if len(inside) < _SIGNATURE:
            raise SealError("nothing that was signed is in it")
        signature, data = inside[:_SIGNATURE], inside[_SIGNATURE:]
        verify(sender, "update", _signed(self.public, about, data), signature)
        return data


def seal_for(receiver: bytes, data: bytes, about: bytes, signer: Signer) -> bytes:
    """``data`` for the owner of the public key ``receiver`` alone; 124 bytes longer.

    :param about: bound to it and not sent: job, round, client.
    :raises SealError: ``receiver`` is no public key.
    """
    once = Pair(seed(), _INFO)
    key = once.agree(receiver, _bound(once.public, receiver))
    return once.public + lock(key, signer.sign("update", _signed(receiver, about, data)) + data, about)


def _bound(once: bytes, receiver: bytes) -> bytes:
    return _INFO + b"|" + once + receiver


def _signed(receiver: bytes, about: bytes, data: bytes) -> bytes:
    return msgspec.msgpack.encode([receiver, about, data])
