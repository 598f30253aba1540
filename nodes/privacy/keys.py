"""Keys of a device and of one round: agreeing on secrets, signing, sealing. All primitives are those of ``cryptography``.

X25519 (RFC 7748), HKDF with SHA-256 (RFC 5869), AES-256 in GCM and CTR mode (NIST SP 800-38D, 38A), Ed25519 (RFC 8032).
Nothing here does I/O; the library is imported at the first call.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import msgspec

from schemas.errors import MissingError, PenstockError

EXTRA = "federated"
SEED = 16
"""Bytes of a secret that is shared or makes a key: 128 bits."""
NONCE = 12
TAG = 16


class SealError(PenstockError):
    """What should have been signed or sealed for us is not, or was changed."""


@cache
def _library() -> Any:
    """The parts of ``cryptography``, as one object.

    :raises MissingError: it is not installed.
    """
    try:
        from cryptography.exceptions import InvalidSignature, InvalidTag
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519, x25519
        from cryptography.hazmat.primitives.ciphers import Cipher, aead, algorithms, modes
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "cryptography":
            raise
        raise MissingError("cryptography", extra=EXTRA) from error
    from types import SimpleNamespace

    return SimpleNamespace(
        InvalidSignature=InvalidSignature,
        InvalidTag=InvalidTag,
        hashes=hashes,
        raw=serialization.Encoding.Raw,
        raw_public=serialization.PublicFormat.Raw,
        raw_private=serialization.PrivateFormat.Raw,
        plain=serialization.NoEncryption(),
        ed25519=ed25519,
        x25519=x25519,
        Cipher=Cipher,
        AESGCM=aead.AESGCM,
        AES=algorithms.AES,
        CTR=modes.CTR,
        HKDF=HKDF,
    )


def require() -> None:
    """Find out now whether all this can be done.

    :raises MissingError: the library is not installed.
    """
    _library()


def seed() -> bytes:
    """A new secret of :data:`SEED` bytes, from the system."""
    return os.urandom(SEED)


def derive(secret: bytes, info: bytes, size: int = 32) -> bytes:
    """``size`` bytes of key for one purpose; ``info`` names the purpose and the round."""
    library = _library()
    out: bytes = library.HKDF(library.hashes.SHA256(), size, None, info).derive(secret)
    return out


class Pair:
    """A key pair for agreeing on secrets, made of a seed alone, so that whoever has the seed has the pair.

    :param made_of: :data:`SEED` secret bytes.
    :param info: what the pair is for.
    """

    def __init__(self, made_of: bytes, info: bytes) -> None:
        library = _library()
        self._private = library.x25519.X25519PrivateKey.from_private_bytes(derive(made_of, b"x25519|" + info))
        self.public: bytes = self._private.public_key().public_bytes(library.raw, library.raw_public)

    def agree(self, other: bytes, info: bytes, size: int = 32) -> bytes:
        """The key that this pair and the owner of the public key ``other`` share, for one purpose.

        :raises SealError: ``other`` is no public key.
        """
        try:
            there = _library().x25519.X25519PublicKey.from_public_bytes(other)
            secret: bytes = self._private.exchange(there)
        except ValueError as error:  # of a wrong length, or of low order: the secret would be zero
            raise SealError("a public key that is none") from error
        return derive(secret, info, size)


def lock(key: bytes, plain: bytes, about: bytes) -> bytes:
    """AES-256-GCM: nonce and ciphertext. ``about`` is bound to it, not sent."""
    nonce = os.urandom(NONCE)
    sealed: bytes = _library().AESGCM(key).encrypt(nonce, plain, about)
    return nonce + sealed


def unlock(key: bytes, locked: bytes, about: bytes) -> bytes:
    """What :func:`lock` was given.

    :raises SealError: another key, another ``about``, or changed on the way.
    """
    library = _library()
    if len(locked) < NONCE + TAG:
        raise SealError("too short to be anything that was sealed")
    try:
        plain: bytes = library.AESGCM(key).decrypt(locked[:NONCE], locked[NONCE:], about)
    except library.InvalidTag as error:
        raise SealError("it was sealed for somebody else, or changed on the way") from error
    return plain


def stream(key: bytes, zeros: bytes | memoryview, out: bytearray | memoryview) -> None:
    """Fill ``out`` with the bytes of AES-256-CTR from 0: the same for the same key on every machine.

    :param key: 32 bytes, used for nothing else.
    :param zeros: as many zero bytes; ``out`` has 16 more than that (what the library asks for).
    """
    library = _library()
    encryptor = library.Cipher(library.AES(key), library.CTR(bytes(16))).encryptor()
    encryptor.update_into(zeros, out)


class Signer:
    """A device's identity: an Ed25519 key pair.

    :param private: 32 bytes; None: a new one.
    """

    def __init__(self, private: bytes | None = None) -> None:
        library = _library()
        keys = library.ed25519.Ed25519PrivateKey
        self._private = keys.generate() if private is None else keys.from_private_bytes(private)
        self.public: bytes = self._private.public_key().public_bytes(library.raw, library.raw_public)

    def private(self) -> bytes:
        """32 bytes, for the device's own store."""
        library = _library()
        out: bytes = self._private.private_bytes(library.raw, library.raw_private, library.plain)
        return out

    def sign(self, purpose: str, data: bytes) -> bytes:
        """64 bytes. ``purpose`` is signed too, so that what was signed for one thing cannot pass for another."""
        out: bytes = self._private.sign(_about(purpose, data))
        return out


def verify(public: bytes, purpose: str, data: bytes, signature: bytes) -> None:
    """Look whether the owner of ``public`` signed ``data`` for ``purpose``.

    :raises SealError: no.
    """
    library = _library()
    try:
        key = library.ed25519.Ed25519PublicKey.from_public_bytes(public)
        key.verify(signature, _about(purpose, data))
    except (library.InvalidSignature, ValueError) as error:
        raise SealError(f"the signature of the {purpose} is not that of its sender") from error


def _about(purpose: str, data: bytes) -> bytes:
    return msgspec.msgpack.encode(["penstock", purpose, data])
