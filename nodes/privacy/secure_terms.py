"""What the parties of a secure sum agree on and say to each other: terms, messages, who shares with whom."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from nodes.privacy.fixed_point import FixedPoint
from nodes.privacy.keys import SealError, Signer, verify
from schemas.errors import ConfigError, PenstockError

T = TypeVar("T")


class SecureSumError(PenstockError):
    """A secure sum does not go on: one party is refused, or all of it.

    :param reason: a short stable word. Of the round: ``few`` (below the threshold or the least number), ``shares`` (what was
        revealed does not give a secret back). Of a message: ``garbled``, ``terms``, ``signature``, ``unknown`` (its sender),
        ``changed`` (another than before), ``late`` and ``early``, ``both`` (asks for what would lay an update open).
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Terms(msgspec.Struct, frozen=True):
    """What holds for one sum; all keys of it are bound to them.

    :param size: numbers of one client.
    :param attempt: grows when a round is run again; what a client kept of the one before is then of other terms.
    :param clients: most clients; with ``clip`` and ``most`` see :class:`~nodes.privacy.fixed_point.FixedPoint`.
    :param least: fewest clients whose sum may be known.
    :param threshold: a secret is given back by more than this part of those who hold its shares; [0.5, 1).
    :param degree: neighbours of a client (SecAgg+); 0: all others.
    :param agreed: clients sign the list of survivors and see that enough others have signed the same one before they reveal
        anything (the consistency check of Bonawitz et al.): one phase more, against a coordinator that lies.
    """

    job: str
    epoch: int
    round: int
    size: int
    clients: int
    clip: float
    most: int
    least: int = 3
    threshold: float = 2 / 3
    degree: int = 0
    agreed: bool = False
    attempt: int = 0

    def check(self) -> None:
        """Whether these terms keep anything secret.

        :raises ConfigError: no; or the numbers do not fit into 32 bits.
        """
        if not 0.5 <= self.threshold < 1:
            raise ConfigError(f"threshold is {self.threshold}; expected at least 0.5, and less than 1")
        if self.least < 2:
            raise ConfigError(f"least is {self.least}; the sum of fewer than two clients is no secret")
        if self.degree < 0 or self.degree % 2:
            raise ConfigError(f"degree is {self.degree}; expected an even number, or 0 for all")
        if self.size < 1 or self.clients < self.least:
            raise ConfigError(f"a sum of {self.size} numbers of {self.clients} clients, at least {self.least}")
        self.fixed()

    def fixed(self) -> FixedPoint:
        """How the numbers are written."""
        return FixedPoint(self.clients, self.clip, self.most)

    def needed(self, holders: int) -> int:
        """Shares that give a secret back when so many hold one."""
        return min(holders, math.floor(self.threshold * holders + 1e-9) + 1)

    @property
    def context(self) -> bytes:
        """32 bytes that stand for these terms."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).digest()


def terms_of(job: str, number: int, said: Mapping[str, Any]) -> Terms:
    """The terms that a call says.

    :raises ConfigError: they keep nothing secret, or are none.
    """
    if unknown := set(said) - set(Terms.__struct_fields__):
        raise ConfigError(
            f"the terms of a secure sum say {', '.join(sorted(unknown))}, which this version does not know"
        )
    try:
        terms = msgspec.convert({**said, "job": job, "round": number}, Terms)
    except msgspec.ValidationError as error:
        raise ConfigError(f"no terms of a secure sum: {error}") from None
    terms.check()
    return terms


class Key(msgspec.Struct, frozen=True):
    """A client's public keys of this sum: for sealing shares to it, and for masks; signed by the device."""

    client: str
    channel: bytes
    mask: bytes
    signature: bytes = b""

    def signed(self, context: bytes) -> bytes:
        """What the signature covers."""
        return msgspec.msgpack.encode([context, self.client, self.channel, self.mask])


class Roster(msgspec.Struct, frozen=True):
    """Who takes part, by name."""

    context: bytes
    keys: list[Key]

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for this roster."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).digest()

    def names(self) -> list[str]:
        """In order."""
        return [key.client for key in self.keys]


class Shares(msgspec.Struct, frozen=True):
    """A client's shares, each sealed to the neighbour that is to hold it; and what its self-mask must be."""

    client: str
    roster: bytes
    commitment: bytes
    boxes: dict[str, bytes]


class Inbox(msgspec.Struct, frozen=True):
    """The boxes for one client, by who sent them: only with these does it mask."""

    client: str
    roster: bytes
    boxes: dict[str, bytes]


class Survivors(msgspec.Struct, frozen=True):
    """Whose numbers are in the sum, of those who shared their secrets (so that others masked with them)."""

    roster: bytes
    shared: list[str]
    alive: list[str]

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for these lists: what clients sign who agree."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).digest()


class Agreement(msgspec.Struct, frozen=True):
    """A client's signature of the lists that it was sent."""

    client: str
    signature: bytes


class Agreements(msgspec.Struct, frozen=True):
    """All signatures of one pair of lists, by client."""

    signatures: dict[str, bytes]


class Reveal(msgspec.Struct, frozen=True):
    """One client's shares: of the self-masks of those alive, of the mask keys of those that are not."""

    client: str
    roster: bytes
    self_masks: dict[str, bytes]
    mask_keys: dict[str, bytes]


class Signed(msgspec.Struct, frozen=True):
    """What the coordinator says, with its signature (empty: it has no key)."""

    body: bytes
    signature: bytes = b""


def pack(message: msgspec.Struct) -> bytes:
    """As a plain msgpack map."""
    return msgspec.msgpack.encode(message)


def unpack(payload: bytes, form: type[T]) -> T:
    """The message.

    :raises SecureSumError: ``garbled``.
    """
    try:
        return msgspec.msgpack.decode(payload, type=form)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SecureSumError("garbled", f"no {form.__name__.lower()} of a secure sum: {error}") from error


def say(message: msgspec.Struct, signer: Signer | None) -> bytes:
    """Of the coordinator: signed, where it has a key."""
    body = pack(message)
    purpose = f"secure-sum {type(message).__name__.lower()}"
    return pack(Signed(body, signer.sign(purpose, body) if signer else b""))


def hear(payload: bytes, form: type[T], coordinator: bytes | None) -> T:
    """What the coordinator said.

    :param coordinator: its public key; None: it is believed without.
    :raises SecureSumError: ``garbled``, ``signature``.
    """
    outer = unpack(payload, Signed)
    if coordinator is not None:
        try:
            verify(coordinator, f"secure-sum {form.__name__.lower()}", outer.body, outer.signature)
        except SealError as error:
            raise SecureSumError("signature", str(error)) from error
    return unpack(outer.body, form)


def authentic(key: Key, devices: Mapping[str, bytes], context: bytes) -> None:
    """Whether a device that is known signed these keys.

    :raises SecureSumError: ``unknown`` or ``signature``.
    """
    if key.client not in devices:
        raise SecureSumError("unknown", f"{key.client} is no device of this job")
    try:
        verify(devices[key.client], "secure-sum key", key.signed(context), key.signature)
    except SealError as error:
        raise SecureSumError("signature", f"{key.client}: {error}") from error


class Graph:
    """Who holds whose shares: everybody, or (SecAgg+) the nearest on a ring whose order comes from the keys of all.

    The coordinator does not choose the order: it follows from the roster. A regular graph on a ring is Harary's; that its order
    must be random to those who collude is from Bell et al. 2020.
    """

    def __init__(self, roster: Roster, degree: int) -> None:
        self.names = roster.names()
        self._all = degree == 0 or degree >= len(self.names) - 1
        self._half = degree // 2
        if not self._all:
            begin = roster.digest
            self._ring = sorted(self.names, key=lambda name: hashlib.sha256(begin + name.encode()).digest())
            self._at = {name: i for i, name in enumerate(self._ring)}

    def holders(self, name: str) -> Sequence[str]:
        """Neighbours and itself, by name. Who holds shares of whom is mutual."""
        if self._all:
            return self.names
        at, ring = self._at[name], self._ring
        return sorted(ring[(at + step) % len(ring)] for step in range(-self._half, self._half + 1))


def degree_for(
    clients: int, threshold: float, dropped: float, corrupt: float, fails: int = 20, breaks: int = 40
) -> int:
    """The smallest degree for so many clients, after Bell et al. 2020 (theorem 3.1), by exact tails; 0: all with all.

    :param dropped: part of the clients that may drop out.
    :param corrupt: part that may hand all they know to a coordinator that otherwise keeps to the protocol.
    :param fails: the sum fails with a probability of at most 2⁻ᶠᵃⁱˡˢ.
    :param breaks: an update is laid open with one of at most 2⁻ᵇʳᵉᵃᵏˢ.
    """
    others = clients - 1
    gone, bad = math.ceil(dropped * clients), math.ceil(corrupt * clients)
    for degree in range(2, others, 2):
        needed = min(degree + 1, math.floor(threshold * (degree + 1) + 1e-9) + 1)
        too_few = _tail(others, gone, degree, degree - needed + 1)
        too_many = _tail(others, bad, degree, needed)
        apart = clients * (dropped + corrupt) ** (degree / 2)
        if clients * too_few <= 2.0**-fails and clients * too_many + apart <= 2.0**-breaks:
            return degree
    return 0


def _tail(whole: int, marked: int, drawn: int, least: int) -> float:
    """Probability of at least ``least`` marked ones among ``drawn`` of ``whole`` (hypergeometric)."""
    marked = min(marked, whole)
    every = _choose(whole, drawn)
    return sum(
        math.exp(_choose(marked, i) + _choose(whole - marked, drawn - i) - every)
        for i in range(max(least, drawn - (whole - marked), 0), min(marked, drawn) + 1)
    )


def _choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
