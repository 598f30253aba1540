"""A client of a secure sum; see :mod:`nodes.privacy.secure_sum`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from nodes.privacy import shares
from nodes.privacy.keys import Pair, SealError, Signer, lock, seed, unlock, verify
from nodes.privacy.masks import Masks, commitment, pair_mask, self_mask
from nodes.privacy.secure_terms import (
    Agreement,
    Agreements,
    Graph,
    Inbox,
    Key,
    Reveal,
    Roster,
    SecureSumError,
    Shares,
    Survivors,
    Terms,
    authentic,
    hear,
    pack,
)
from schemas.errors import ConfigError
from schemas.messages import Array


class _ClientState(msgspec.Struct):
    channel: bytes
    mask: bytes
    own: bytes
    roster: Roster | None = None
    shared: bytes = b""
    own_shares: tuple[bytes, bytes] = (b"", b"")
    inbox: bytes = b""
    values: bytes = b""
    held: dict[str, tuple[bytes, bytes]] = {}
    survivors: bytes = b""


class Client:
    """One client's side of one sum.

    :param signer: this device's identity; None: its keys are not signed.
    :param coordinator: the coordinator's public key; None: what it says is believed without a signature.
    :param devices: public keys of the devices that may take part; None: the coordinator is believed about them.
    :param least: fewest clients that it takes part with, whatever the terms say.
    :raises ConfigError: the terms keep nothing secret, or want signatures that cannot be made or looked at.
    """

    def __init__(
        self,
        name: str,
        terms: Terms,
        *,
        signer: Signer | None = None,
        coordinator: bytes | None = None,
        devices: Mapping[str, bytes] | None = None,
        least: int = 3,
        kept: bytes = b"",
    ) -> None:
        terms.check()
        if terms.agreed and (signer is None or devices is None):
            raise ConfigError(
                "clients that agree on who survived need keys of their own, and to know those of the others"
            )
        self.name = name
        self.terms = terms
        self.clipped = 0
        self._signer, self._coordinator, self._devices = signer, coordinator, devices
        self._least = max(least, terms.least)
        self._context = terms.context
        self._state = msgspec.msgpack.decode(kept, type=_ClientState) if kept else _ClientState(seed(), seed(), seed())
        self._channel = Pair(self._state.channel, b"channel|" + self._context)
        self._mask = Pair(self._state.mask, b"mask|" + self._context)

    def snapshot(self) -> bytes:
        """All it must remember, with secrets: for this device's own disk. Hand it back as ``kept``."""
        return msgspec.msgpack.encode(self._state)

    def keys(self) -> bytes:
        """Its public keys."""
        return pack(self._key())

    def _key(self) -> Key:
        key = Key(self.name, self._channel.public, self._mask.public)
        if self._signer is None:
            return key
        return msgspec.structs.replace(key, signature=self._signer.sign("secure-sum key", key.signed(self._context)))

    def share(self, payload: bytes) -> bytes:
        """Take the roster; share both secrets among those that hold them.

        :raises SecureSumError: too small, changed, of other terms, without us, with keys that nobody signed.
        """
        roster = hear(payload, Roster, self._coordinator)
        state = self._state
        if state.roster is not None:
            if state.roster.digest != roster.digest:
                raise SecureSumError("changed", "another roster of the same sum")
            return state.shared
        self._look(roster)
        graph, digest = Graph(roster, self.terms.degree), roster.digest
        holders = graph.holders(self.name)
        needed = self.terms.needed(len(holders))
        own = shares.split(state.own, needed, len(holders))
        masks = shares.split(state.mask, needed, len(holders))
        known = {key.client: key for key in roster.keys}
        boxes = {}
        for peer, share, other in zip(holders, own, masks, strict=True):
            if peer == self.name:
                state.own_shares = (share, other)
            else:
                key = self._box_key(known[peer].channel, self.name, peer, digest)
                boxes[peer] = lock(key, share + other, digest)
        state.roster = roster
        state.shared = pack(Shares(self.name, digest, commitment(state.own, self._context), boxes))
        return state.shared

    def _look(self, roster: Roster) -> None:
        names = roster.names()
        if roster.context != self._context:
            raise SecureSumError("terms", "a roster of other terms than were announced")
        if names != sorted(set(names)) or len(names) > self.terms.clients:
            raise SecureSumError("garbled", "a roster whose names are not in order, or too many")
        if self._key() not in roster.keys:
            raise SecureSumError("changed", "a roster without us, or with other keys in our name")
        holders = Graph(roster, self.terms.degree).holders(self.name)
        if len(names) < self._least or len(holders) < min(self._least, len(names)):
            raise SecureSumError("few", f"a roster of {len(names)}; we take part with {self._least} or more")
        if len({key.channel for key in roster.keys} | {key.mask for key in roster.keys}) != 2 * len(names):
            raise SecureSumError("garbled", "a roster in which two have one key")
        if self._devices is not None:
            wanted = set(holders)
            for key in roster.keys:
                if key.client in wanted:
                    authentic(key, self._devices, self._context)

    def _box_key(self, other: bytes, sender: str, receiver: str, digest: bytes) -> bytes:
        return self._channel.agree(other, msgspec.msgpack.encode(["share", digest, sender, receiver]))

    def mask(self, payload: bytes, values: Array, samples: int) -> Array:
        """Take the shares of others; its numbers, masked.

        :param values: [terms.size], real; clipped to ±terms.clip (``clipped`` then says how many were).
        :param samples: their weight.
        :returns: uint32 [terms.size + 1]; the same for the same values, so either the answer or the values are to be kept.
        :raises SecureSumError: a box that is not for us, too few of them, or other values than before.
        """
        inbox = hear(payload, Inbox, self._coordinator)
        state = self._state
        roster = self._round(inbox.roster)
        if values.shape != (self.terms.size,):
            raise SecureSumError("terms", f"{list(values.shape)} numbers; the terms say {self.terms.size}")
        written, self.clipped = self.terms.fixed().write(values, samples)
        seen, asked = hashlib.sha256(written.tobytes()).digest(), hashlib.sha256(pack(inbox)).digest()
        if state.inbox and (state.inbox, state.values) != (asked, seen):
            raise SecureSumError("changed", "other numbers, or other neighbours, under the same masks")
        if not state.inbox:
            state.held = self._opened(inbox, roster)
        state.inbox, state.values = asked, seen
        known = {key.client: key for key in roster.keys}
        masks = Masks(len(written))
        masks.add(self_mask(state.own, self._context), written, 1)
        for peer in inbox.boxes:
            masks.add(pair_mask(self._mask, known[peer].mask, self._context), written, 1 if self.name < peer else -1)
        return written

    def _opened(self, inbox: Inbox, roster: Roster) -> dict[str, tuple[bytes, bytes]]:
        """The shares of both secrets of each neighbour that sent its own, and of us."""
        holders = Graph(roster, self.terms.degree).holders(self.name)
        known = {key.client: key for key in roster.keys}
        if inbox.client != self.name or not set(inbox.boxes) <= set(holders) - {self.name}:
            raise SecureSumError("unknown", "boxes of others than our neighbours")
        if len(inbox.boxes) + 1 < max(self.terms.needed(len(holders)), min(self._least, len(holders))):
            raise SecureSumError("few", f"{len(inbox.boxes)} of {len(holders) - 1} neighbours sent their shares")
        held = {self.name: self._state.own_shares}
        for peer, box in sorted(inbox.boxes.items()):
            try:
                both = unlock(self._box_key(known[peer].channel, peer, self.name, inbox.roster), box, inbox.roster)
            except SealError as error:
                raise SecureSumError("signature", f"the shares of {peer}: {error}") from error
            if len(both) != 2 * shares.SIZE:
                raise SecureSumError("garbled", f"the shares of {peer} have {len(both)} bytes")
            held[peer] = both[: shares.SIZE], both[shares.SIZE :]
        return held

    def _round(self, digest: bytes) -> Roster:
        roster = self._state.roster
        if roster is None:
            raise SecureSumError("early", "there is no roster yet")
        if roster.digest != digest:
            raise SecureSumError("changed", "of another roster")
        return roster

    def agree(self, payload: bytes) -> bytes:
        """Take the list of those whose numbers arrived, and sign it (where the terms say ``agreed``).

        :raises SecureSumError: as :meth:`reveal`.
        """
        asked = self._survivors(payload)
        assert self._signer is not None  # noqa: S101 - looked at in the beginning
        return pack(Agreement(self.name, self._signer.sign("secure-sum agreement", asked.digest)))

    def reveal(self, payload: bytes, agreements: bytes = b"") -> bytes:
        """For each whose shares it holds, one of the two, by the list of those whose numbers arrived: never both.

        :param payload: that list.
        :param agreements: where the terms say ``agreed``: who signed it.
        :raises SecureSumError: a second list, one that is too short, or without us, or that too few have signed.
        """
        asked = self._survivors(payload)
        if self.terms.agreed:
            self._enough_agree(asked, hear(agreements, Agreements, self._coordinator))
        alive, held = set(asked.alive), self._state.held
        own = {peer: both[0] for peer, both in held.items() if peer in alive}
        gone = {peer: both[1] for peer, both in held.items() if peer not in alive}
        return pack(Reveal(self.name, asked.roster, own, gone))

    def _survivors(self, payload: bytes) -> Survivors:
        asked = hear(payload, Survivors, self._coordinator)
        state = self._state
        roster = self._round(asked.roster)
        if not state.inbox:
            raise SecureSumError("early", "asked for shares before there was anything to unmask")
        if state.survivors and state.survivors != asked.digest:
            raise SecureSumError(
                "both", "another list of survivors: with the shares of both, an update would be laid open"
            )
        alive, shared, names = set(asked.alive), set(asked.shared), roster.names()
        if asked.alive != sorted(alive) or not alive <= shared or not shared <= set(names) or self.name not in alive:
            raise SecureSumError("unknown", "a list of survivors without us, or with others than those who shared")
        if set(state.held) != shared & set(Graph(roster, self.terms.degree).holders(self.name)):
            raise SecureSumError("changed", "others have shared than those whose shares we were sent")
        if len(alive) < max(self._least, self.terms.needed(len(names))):
            raise SecureSumError("few", f"{len(alive)} of {len(names)} survived; their sum is not given away")
        state.survivors = asked.digest
        return asked

    def _enough_agree(self, asked: Survivors, given: Agreements) -> None:
        assert self._devices is not None  # noqa: S101 - looked at in the beginning
        names = self._round(asked.roster).names()
        for name, signature in given.signatures.items():
            if name not in asked.alive or name not in self._devices:
                raise SecureSumError("unknown", f"{name} has no part in this sum")
            try:
                verify(self._devices[name], "secure-sum agreement", asked.digest, signature)
            except SealError as error:
                raise SecureSumError("signature", f"{name}: {error}") from error
        if len(given.signatures) < (needed := self.terms.needed(len(names))):
            raise SecureSumError("few", f"{len(given.signatures)} have signed this list; {needed} are needed")
