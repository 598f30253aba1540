"""What somebody knows who heard all that was said in a job with secure sums, and keeps all that its coordinator committed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
from job_site import Site

from nodes.federated import wire
from nodes.privacy import shares
from nodes.privacy.keys import Pair
from nodes.privacy.masks import Masks, commitment, pair_mask, self_mask
from nodes.privacy.secure_terms import (
    Graph,
    Inbox,
    Key,
    Reveal,
    Roster,
    Shares,
    Signed,
    Survivors,
    Terms,
    terms_of,
    unpack,
)
from schemas.messages import Array

T = TypeVar("T")


class Attempt:
    """All that was said of one secure sum."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.keys: dict[str, Key] = {}
        self.roster: Roster | None = None
        self.shares: dict[str, Shares] = {}
        self.inboxes: dict[str, Inbox] = {}
        self.vectors: dict[str, Array] = {}
        self.survivors: Survivors | None = None
        self.reveals: dict[str, Reveal] = {}


class Listened:
    """Everything on the bus, put in order by sum. A step that is said twice has to be the same both times.

    :param said: (topic, payload) in order; of a site: what its world published.
    :param forgetful: the coordinator may say a step in two ways, as its disk may have lost the first.
    """

    def __init__(self, said: Site | Iterable[tuple[str, bytes]], *, forgetful: bool = False) -> None:
        self.forgetful = forgetful
        heard = [(say.topic, say.payload) for _, say in said.heard] if isinstance(said, Site) else list(said)
        self.attempts: dict[tuple[int, int], Attempt] = {}
        self.committed: dict[int, tuple[int, str]] = {}
        self._tokens: dict[str, Attempt] = {}
        for topic, payload in heard:
            parts = topic.split("/")
            if (signed := wire.signed(payload)) is not None:
                payload = signed.message
            if topic == "round":
                self._call(wire.hear(wire.Call, payload))
            elif topic == "model":
                manifest = wire.hear(wire.Manifest, payload)
                self.committed[manifest.version] = manifest.round, manifest.digest
            elif parts[-1] == "up" and wire.sealed(payload) is None:
                self.update(parts[1], payload)
            elif parts[0] == "r" or parts[-1] in {"part", "inbox"}:
                self._part(parts[1], wire.hear(wire.Part, payload))
        for commit in said.commits if isinstance(said, Site) else ():  # sealed ones can be read there only
            for key, kept in commit.items():
                if key.startswith("update/") and kept is not None:
                    self.update(key.rpartition("/")[2], kept)

    def _call(self, call: wire.Call) -> None:
        if call.secure:
            terms = terms_of(call.job, call.round, call.secure)
            known = self.attempts.setdefault((call.round, terms.epoch), Attempt(terms))
            assert known.terms == terms
            self._tokens[terms.context.hex()[: wire.BASE]] = known

    def update(self, client: str, payload: bytes) -> None:
        """A masked vector, wherever it was seen."""
        _, body, _ = wire.unpack_update(payload)
        assert set(body.tensors) == {wire.MASKED_NUMBERS}
        assert body.samples == 1
        assert not body.metrics
        vector = np.array(body.tensors[wire.MASKED_NUMBERS])
        same(self._tokens[body.base].vectors, client, vector.tobytes(), vector)

    def _part(self, client: str, part: wire.Part) -> None:
        attempt = self.attempts.get((part.round, part.epoch))
        if attempt is None or part.what in {"ask", "out", "agree", "agreements"}:
            return
        match part.what:
            case "key":
                once(attempt.keys, client, unpack(part.body, Key))
            case "share":
                once(attempt.shares, client, unpack(part.body, Shares))
            case "reveal":
                once(attempt.reveals, client, unpack(part.body, Reveal))
            case "roster":
                roster = unpack(unpack(part.body, Signed).body, Roster)
                assert attempt.roster is None or attempt.roster == roster or self.forgetful
                attempt.roster = roster
            case "inbox":
                inbox = unpack(unpack(part.body, Signed).body, Inbox)
                assert attempt.inboxes.setdefault(client, inbox) == inbox or self.forgetful
            case "survivors":
                lists = unpack(unpack(part.body, Signed).body, Survivors)
                assert attempt.survivors is None or attempt.survivors == lists or self.forgetful
                attempt.survivors = lists
            case other:
                raise AssertionError(other)

    def revealed(self, attempt: Attempt, client: str, *, own: bool) -> dict[int, bytes]:
        """The shares of one secret of a client that were given back, by number."""
        assert attempt.roster is not None
        out = {}
        for number, holder in enumerate(Graph(attempt.roster, attempt.terms.degree).holders(client), 1):
            if (reveal := attempt.reveals.get(holder)) is not None:
                share = (reveal.self_masks if own else reveal.mask_keys).get(client)
                if share is not None:
                    out[number] = share
        return out

    def secret(self, attempt: Attempt, client: str, *, own: bool) -> bytes | None:
        """A secret that can be put together from what was given back, checked against what it was told by."""
        found = self.revealed(attempt, client, own=own)
        assert attempt.roster is not None
        holders = Graph(attempt.roster, attempt.terms.degree).holders(client)
        if len(found) < attempt.terms.needed(len(holders)):
            return None
        secret = shares.combine(dict(sorted(found.items())[: attempt.terms.needed(len(holders))]))
        context = attempt.terms.context
        if own:
            assert commitment(secret, context) == attempt.shares[client].commitment
        else:
            assert Pair(secret, b"mask|" + context).public == attempt.keys[client].mask
        return secret

    def bare(self, number: int) -> dict[str, Array]:
        """The vectors of a round with every mask taken off that can be known; only those with one that can."""
        out: dict[str, Array] = {}
        for (round_, _), attempt in self.attempts.items():
            if round_ == number and attempt.roster is not None and attempt.survivors is not None:
                out |= self._taken_off(attempt)
        return out

    def _taken_off(self, attempt: Attempt) -> dict[str, Array]:
        assert attempt.roster is not None
        assert attempt.survivors is not None
        context, known = attempt.terms.context, {key.client: key for key in attempt.roster.keys}
        graph, shared = Graph(attempt.roster, attempt.terms.degree), set(attempt.survivors.shared)
        masks, out = Masks(attempt.terms.size + 1), dict[str, Array]()
        for client in sorted(shared):
            own, key = self.secret(attempt, client, own=True), self.secret(attempt, client, own=False)
            assert own is None or key is None, "both secrets of one client can be put together"
            if own is not None and client in attempt.vectors:
                out.setdefault(client, attempt.vectors[client].copy())
                masks.add(self_mask(own, context), out[client], -1)
            if key is not None:
                pair = Pair(key, b"mask|" + context)
                for peer in set(graph.holders(client)) & shared - {client}:
                    if peer in attempt.vectors:
                        out.setdefault(peer, attempt.vectors[peer].copy())
                        masks.add(pair_mask(pair, known[peer].mask, context), out[peer], -1 if peer < client else 1)
        return out


def once(known: dict[str, T], client: str, said: T) -> None:
    assert known.setdefault(client, said) == said, f"{client} said two different things"


def same(known: dict[str, Array], client: str, data: bytes, vector: Array) -> None:
    assert known.setdefault(client, vector).tobytes() == data, f"{client} masked two vectors with the same masks"


def audit_secure(site: Site, *, forgetful: bool = False) -> dict[int, list[str]]:
    """Look at all that was said; who is in the sum of each round that was committed.

    Nobody masks two vectors with the same masks, says a step in two ways, or is laid open by shares of both secrets.

    :param forgetful: see :class:`Listened`.
    """
    heard = Listened(site, forgetful=forgetful)
    out: dict[int, list[str]] = {}
    for (number, _), attempt in heard.attempts.items():
        own = {client for reveal in attempt.reveals.values() for client in reveal.self_masks}
        keys = {client for reveal in attempt.reveals.values() for client in reveal.mask_keys}
        assert not own & keys, "a share of each secret of one client"
        if attempt.survivors is not None and number in {made for made, _ in heard.committed.values()}:
            assert own <= set(attempt.survivors.alive) or forgetful
            out[number] = list(attempt.survivors.alive)
    return out


def small_mixtures(bare: dict[str, Array]) -> list[tuple[int, ...]]:
    """Which sums and differences of these vectors are no noise: all factors -1, 0, 1 but for the sign of the whole.

    Of numbers that are spread evenly over 32 bits the absolute values are 2³⁰ on average.
    """
    names = sorted(bare)
    table = np.stack([bare[name] for name in names]).astype(np.int64)
    out = []
    for signs in itertools.product((-1, 0, 1), repeat=len(names)):
        if any(signs) and next(s for s in signs if s) > 0:
            mixed = (np.asarray(signs) @ table).astype(np.uint32).view(np.int32)
            if np.abs(mixed.astype(np.float64)).mean() < 0.7 * 2**30:
                out.append(signs)
    return out
