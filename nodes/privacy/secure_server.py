"""The coordinator of a secure sum; see :mod:`nodes.privacy.secure_sum`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations, islice
from typing import Literal

import msgspec
import numpy as np

from nodes.privacy import shares
from nodes.privacy.keys import Pair, SealError, Signer, verify
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
    say,
    unpack,
)
from schemas.messages import Array

_TRIES = 200
"""Sets of shares that are tried where some of them are wrong."""


class _ServerState(msgspec.Struct):
    keys: dict[str, Key] = {}
    roster: Roster | None = None
    shares: dict[str, Shares] = {}
    boxed: list[str] = []
    arrived: list[str] = []
    sum: bytes = b""
    alive: list[str] = []
    agreed: dict[str, bytes] = {}
    asked: bytes = b""
    reveals: dict[str, Reveal] = {}


class Server:
    """The coordinator's side of one sum. A repeated message changes nothing; another one in its place is refused.

    ``key``, ``share``, ``agree`` and ``reveal`` answer whose message it was: who carries them compares that with the topic on
    which it came, as only keys and agreements are signed.

    :param signer: the coordinator's key; None: nothing is signed.
    :param devices: public keys of the devices that may take part; None: anybody may.
    :param kept: a :meth:`snapshot`.
    :raises ConfigError: the terms keep nothing secret.
    """

    def __init__(
        self,
        terms: Terms,
        *,
        signer: Signer | None = None,
        devices: Mapping[str, bytes] | None = None,
        kept: bytes = b"",
    ) -> None:
        terms.check()
        self.terms = terms
        self._signer, self._devices = signer, devices
        self._context = terms.context
        self._state = msgspec.msgpack.decode(kept, type=_ServerState) if kept else _ServerState()
        self._sum = np.zeros(terms.size + 1, np.uint32)
        self._added = bool(self._state.sum)
        if self._added:
            self._sum[:] = np.frombuffer(self._state.sum, "<u4")
        self._graph = Graph(self._state.roster, terms.degree) if self._state.roster else None

    def snapshot(self) -> bytes:
        """All it must remember; no secret of a client is in it before the shares are revealed."""
        self._state.sum = self._sum.astype("<u4", copy=False).tobytes() if self._added else b""
        return msgspec.msgpack.encode(self._state)

    @property
    def alive(self) -> list[str]:
        """Whose numbers are in the sum; known from :meth:`survivors` on."""
        return list(self._state.alive)

    @property
    def waiting(self) -> list[str]:
        """Of whom the next message is still missing, by name; in the phase of keys: nobody, as anybody may come."""
        state = self._state
        if state.alive and self.terms.agreed and not state.asked:
            return [name for name in state.alive if name not in state.agreed]
        if state.alive:
            return [name for name in state.alive if name not in state.reveals]
        if state.boxed:
            return [name for name in state.boxed if name not in state.arrived]
        return [name for name in self._names() if name not in state.shares]

    @property
    def needed(self) -> int:
        """Clients of the roster without which no later phase can be closed."""
        return max(self.terms.least, self.terms.needed(len(self._names())))

    def count(self, phase: Literal["keys", "shares", "agreed", "reveals"]) -> int:
        """How many have taken that step."""
        return len(getattr(self._state, phase))

    def has_key(self, client: str) -> bool:
        """Whether that client's keys have come."""
        return client in self._state.keys

    def key(self, payload: bytes) -> str:
        """A client's keys; answers who it is.

        :raises SecureSumError: ``garbled``, ``late``, ``changed``, ``unknown``, ``signature``.
        """
        key = unpack(payload, Key)
        known = self._state.keys.get(key.client)
        if known is not None and known != key:
            raise SecureSumError("changed", f"{key.client} has sent other keys before")
        if known is None:
            if self._state.roster is not None:
                raise SecureSumError("late", f"the keys of {key.client} came after the roster")
            if len(key.channel) != 32 or len(key.mask) != 32:
                raise SecureSumError("garbled", f"{key.client} sent no keys")
            if len(self._state.keys) >= self.terms.clients:
                raise SecureSumError("late", f"there are {self.terms.clients} clients already")
            if self._devices is not None:
                authentic(key, self._devices, self._context)
            self._state.keys[key.client] = key
        return key.client

    def roster(self) -> bytes:
        """Close the phase of keys: what every client is sent.

        :raises SecureSumError: ``few``.
        """
        state = self._state
        if state.roster is None:
            if len(state.keys) < self.terms.least:
                raise SecureSumError("few", f"{len(state.keys)} clients; the terms want {self.terms.least}")
            state.roster = Roster(self._context, [state.keys[name] for name in sorted(state.keys)])
            self._graph = Graph(state.roster, self.terms.degree)
        return say(state.roster, self._signer)

    def _names(self) -> list[str]:
        return self._state.roster.names() if self._state.roster else []

    def _holders(self, name: str) -> list[str]:
        assert self._graph is not None  # noqa: S101 - there is a roster wherever this is called
        return list(self._graph.holders(name))

    def _of_round(self, name: str, digest: bytes, among: Iterable[str]) -> None:
        if self._state.roster is None:
            raise SecureSumError("early", "there is no roster yet")
        if digest != self._state.roster.digest:
            raise SecureSumError("changed", f"{name} has another roster")
        if name not in among:
            raise SecureSumError("unknown", f"{name} takes no part in this")

    def share(self, payload: bytes) -> str:
        """A client's sealed shares; answers who it is.

        :raises SecureSumError: as :meth:`key`; ``garbled``: not one box for each neighbour.
        """
        got = unpack(payload, Shares)
        self._of_round(got.client, got.roster, self._names())
        known = self._state.shares.get(got.client)
        if known is not None and known != got:
            raise SecureSumError("changed", f"{got.client} has shared otherwise before")
        if known is None:
            if self._state.boxed:
                raise SecureSumError("late", f"the shares of {got.client} came after they were handed out")
            if sorted([*got.boxes, got.client]) != self._holders(got.client) or len(got.commitment) != 32:
                raise SecureSumError("garbled", f"{got.client} has not shared with each of its neighbours")
            self._state.shares[got.client] = got
        return got.client

    def inboxes(self) -> dict[str, bytes]:
        """Close the phase of shares: what each client that shared is sent.

        :raises SecureSumError: ``few``.
        """
        state = self._state
        if not state.boxed:
            self._enough(len(state.shares), "shared their secrets")
            state.boxed = sorted(state.shares)
        return {name: self.inbox(name) for name in state.boxed}

    def inbox(self, client: str) -> bytes:
        """One of :meth:`inboxes`, after them."""
        state = self._state
        assert state.roster is not None  # noqa: S101 - somebody has shared
        boxes = {peer: state.shares[peer].boxes[client] for peer in self._peers(client)}
        return say(Inbox(client, state.roster.digest, boxes), self._signer)

    def _peers(self, name: str) -> list[str]:
        """With whom a client has masks in common."""
        boxed = set(self._state.boxed)
        return [peer for peer in self._holders(name) if peer != name and peer in boxed]

    def _enough(self, count: int, what: str) -> None:
        if count < self.needed:
            raise SecureSumError("few", f"{count} of {len(self._names())} clients {what}; {self.needed} are needed")

    def masked(self, client: str, vector: Array) -> None:
        """A client's masked numbers, added up at once: only the sum is kept. A repeat is not looked at.

        :param vector: uint32 [terms.size + 1].
        :raises SecureSumError: ``unknown``, ``garbled``, ``late``.
        """
        if vector.dtype.kind != "u" or vector.dtype.itemsize != 4 or vector.shape != self._sum.shape:
            raise SecureSumError("garbled", f"{client} sent {vector.dtype.name}{list(vector.shape)}")
        if self.came(client):
            np.add(self._sum, vector, out=self._sum)
            self._added = True

    def came(self, client: str) -> bool:
        """A client's masked numbers have arrived, and are kept by whoever carries this, who gives them to :meth:`total`.
        False: they had before.

        :raises SecureSumError: ``unknown``, ``late``.
        """
        state = self._state
        if client not in state.boxed:
            raise SecureSumError("unknown", f"{client} takes no part in this")
        if client in state.arrived:
            return False
        if state.alive:
            raise SecureSumError("late", f"the numbers of {client} came after the sum was closed")
        state.arrived.append(client)
        return True

    def survivors(self) -> bytes:
        """Close the sum: the list that every client in it is sent.

        :raises SecureSumError: ``few``.
        """
        state = self._state
        if not state.alive:
            self._enough(len(state.arrived), "sent their numbers")
            state.alive = sorted(state.arrived)
        assert state.roster is not None  # noqa: S101 - numbers have arrived
        return say(Survivors(state.roster.digest, state.boxed, state.alive), self._signer)

    def agree(self, payload: bytes) -> str:
        """A client's signature of the list; answers who it is. Only where the terms say ``agreed``.

        :raises SecureSumError: ``unknown``, ``signature``, ``changed``.
        """
        got = unpack(payload, Agreement)
        state = self._state
        if state.roster is None or got.client not in state.alive or (self._devices or {}).get(got.client) is None:
            raise SecureSumError("unknown", f"{got.client} takes no part in this")
        lists = Survivors(state.roster.digest, state.boxed, state.alive)
        try:
            verify((self._devices or {})[got.client], "secure-sum agreement", lists.digest, got.signature)
        except SealError as error:
            raise SecureSumError("signature", f"{got.client}: {error}") from error
        if not state.asked:
            state.agreed[got.client] = got.signature
        return got.client

    def agreements(self) -> bytes:
        """Close this phase: the signatures, for every survivor.

        :raises SecureSumError: ``few``.
        """
        state = self._state
        if not state.asked:
            self._enough(len(state.agreed), "signed the list of survivors")
            state.asked = say(Agreements(dict(sorted(state.agreed.items()))), self._signer)
        return state.asked

    def reveal(self, payload: bytes) -> str:
        """Shares that a client gave back; answers who it is.

        :raises SecureSumError: ``garbled``, ``unknown``, ``changed``.
        """
        got = unpack(payload, Reveal)
        self._of_round(got.client, got.roster, self._state.alive)
        known = self._state.reveals.get(got.client)
        if known is not None and known != got:
            raise SecureSumError("changed", f"{got.client} has revealed something else before")
        mine = {got.client, *self._peers(got.client)}
        alive = set(self._state.alive)
        if set(got.self_masks) != mine & alive or set(got.mask_keys) != mine - alive:
            raise SecureSumError("garbled", f"{got.client} did not reveal one share for each that it holds")
        if any(len(share) != shares.SIZE for share in (*got.self_masks.values(), *got.mask_keys.values())):
            raise SecureSumError("garbled", f"{got.client} revealed what is no share")
        self._state.reveals[got.client] = got
        return got.client

    def ready(self) -> bool:
        """Whether so many revealed that :meth:`total` can put every secret together."""
        return bool(self._state.alive) and all(
            len(self._revealed(name)) >= self.terms.needed(len(self._holders(name))) for name in self._state.boxed
        )

    def _revealed(self, name: str) -> dict[int, bytes]:
        """Shares of one client's secret, by number."""
        alive = name in self._state.alive
        out = {}
        for number, holder in enumerate(self._holders(name), 1):
            if (reveal := self._state.reveals.get(holder)) is not None:
                share = (reveal.self_masks if alive else reveal.mask_keys).get(name)
                if share is not None:
                    out[number] = share
        return out

    def total(self, vectors: Iterable[Array] = ()) -> tuple[Array, int, list[str]]:
        """The weighted sum Σ samples · values of the survivors, float64 [terms.size]; the sum of their samples; their names.

        :param vectors: of all that :meth:`came`, uint32 [terms.size + 1] each.
        :raises SecureSumError: ``few``: too few revealed; ``shares``: what they revealed gives no secret back.
        """
        state = self._state
        if not state.alive:
            raise SecureSumError("early", "the sum is not closed")
        assert state.roster is not None  # noqa: S101 - numbers have arrived
        known = {key.client: key for key in state.roster.keys}
        out, masks = self._sum.copy(), Masks(self.terms.size + 1)
        for vector in vectors:
            np.add(out, vector, out=out)
        alive = set(state.alive)
        for name in state.boxed:
            if name in alive:
                secret = self._secret(name, self._commitment, state.shares[name].commitment)
                masks.add(self_mask(secret, self._context), out, -1)
                continue
            secret = self._secret(name, self._public, known[name].mask)
            pair = self._pair(secret)
            for peer in self._peers(name):
                if peer in alive:
                    masks.add(pair_mask(pair, known[peer].mask, self._context), out, -1 if peer < name else 1)
        values, samples = self.terms.fixed().read(out)
        return values, samples, list(state.alive)

    def _pair(self, secret: bytes) -> Pair:
        return Pair(secret, b"mask|" + self._context)

    def _public(self, secret: bytes) -> bytes:
        return self._pair(secret).public

    def _commitment(self, secret: bytes) -> bytes:
        return commitment(secret, self._context)

    def _secret(self, name: str, told_by: Callable[[bytes], bytes], wanted: bytes) -> bytes:
        """The secret of a client, known by what it was told by before; where a share is wrong, without that one."""
        found = self._revealed(name)
        needed = self.terms.needed(len(self._holders(name)))
        if len(found) < needed:
            raise SecureSumError("few", f"{len(found)} shares of {name}'s secret; {needed} are needed")
        for numbers in islice(combinations(sorted(found), needed), _TRIES):
            try:
                secret = shares.combine({number: found[number] for number in numbers})
            except ValueError:
                continue
            if told_by(secret) == wanted:
                return secret
        raise SecureSumError("shares", f"the shares of {name}'s secret do not give it back")
