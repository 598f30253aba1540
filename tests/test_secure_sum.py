"""Secure aggregation: the sum is right, and what the coordinator and the bus have seen tells no more than it."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.privacy import fixed_point, secure_terms, shares
from nodes.privacy.keys import Pair, Signer
from nodes.privacy.masks import Masks, commitment, pair_mask, self_mask
from nodes.privacy.secure_client import _ClientState
from nodes.privacy.secure_sum import Client, SecureSumError, Server, Terms, degree_for
from nodes.privacy.secure_terms import (
    Agreement,
    Agreements,
    Inbox,
    Key,
    Reveal,
    Roster,
    Shares,
    Signed,
    Survivors,
    pack,
    say,
    unpack,
)
from schemas.errors import ConfigError
from schemas.messages import Array

pytest.importorskip("cryptography", reason="cryptography is not installed: no masks, no secure sums")


class Round:
    """One sum of n clients; whatever crosses the bus, or reaches the coordinator, is in ``seen``."""

    def __init__(self, n: int = 10, size: int = 50, *, signed: bool = True, seed: int = 0, **terms: Any) -> None:
        self.terms = Terms("digits", 1, 7, size, **{"clients": n, "clip": 1.0, "most": 1000, "least": 3, **terms})
        self.names = [f"gateway-{i:03}" for i in range(n)]
        self.signers = {name: Signer() if signed else None for name in self.names}
        self.devices = {name: s.public for name, s in self.signers.items() if s} if signed else None
        self.signer = Signer() if signed else None
        self.server = Server(self.terms, signer=self.signer, devices=self.devices)
        self.clients = {name: self.client(name) for name in self.names}
        rng = np.random.default_rng(seed)
        self.values = {name: rng.uniform(-1, 1, size).astype(np.float32) for name in self.names}
        self.samples = {name: int(rng.integers(1, 1000)) for name in self.names}
        self.seen: list[bytes] = []
        self.vectors: dict[str, Array] = {}
        self.roster = self.survivors = b""
        self.inboxes: dict[str, bytes] = {}

    def client(self, name: str, **options: Any) -> Client:
        coordinator = self.signer.public if self.signer else None
        given = {"signer": self.signers[name], "coordinator": coordinator, "devices": self.devices, **options}
        return Client(name, self.terms, **given)

    def keys(self, names: Iterable[str]) -> None:
        for name in names:
            self.seen.append(self.clients[name].keys())
            self.server.key(self.seen[-1])
        self.roster = self.server.roster()
        self.seen.append(self.roster)

    def share(self, names: Iterable[str]) -> None:
        for name in names:
            self.seen.append(self.clients[name].share(self.roster))
            self.server.share(self.seen[-1])
        self.inboxes = self.server.inboxes()
        self.seen += self.inboxes.values()

    def mask(self, names: Iterable[str]) -> None:
        for name in names:
            self.vectors[name] = self.clients[name].mask(self.inboxes[name], self.values[name], self.samples[name])
            self.seen.append(self.vectors[name].tobytes())
            self.server.masked(name, self.vectors[name])
        self.survivors = self.server.survivors()
        self.seen.append(self.survivors)

    def reveal(self, names: Iterable[str]) -> None:
        left = list(names)
        agreements = b""
        if self.terms.agreed:
            for name in self.server.alive:
                self.seen.append(self.clients[name].agree(self.survivors))
                self.server.agree(self.seen[-1])
            agreements = self.server.agreements()
            self.seen.append(agreements)
        for name in left:
            self.seen.append(self.clients[name].reveal(self.survivors, agreements))
            self.server.reveal(self.seen[-1])

    def run(self, gone: tuple[int, int, int, int] = (0, 0, 0, 0)) -> None:
        """All phases; in each so many of those that are left are lost, from the front."""
        left = list(self.names)
        for act, lost in zip((self.keys, self.share, self.mask, self.reveal), gone, strict=True):
            left = left[lost:]
            act(left)

    def plain(self, names: Iterable[str]) -> tuple[Array, int]:
        """The sum in the clear."""
        chosen = list(names)
        total = sum(self.samples[n] * self.values[n].astype(np.float64) for n in chosen)
        return np.asarray(total), sum(self.samples[n] for n in chosen)

    def right(self, names: list[str]) -> None:
        """The server's sum is that of these clients, to half a step of the scale for each."""
        values, samples, alive = self.server.total()
        wanted, count = self.plain(names)
        fixed = self.terms.fixed()
        assert alive == names
        assert samples == count
        assert np.abs(values - wanted).max() <= len(names) * 0.5 * fixed.step * fixed.most * 1.0001


def refused(reason: str, act: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(SecureSumError) as caught:
        act(*args)
    assert caught.value.reason == reason, str(caught.value)


@pytest.mark.parametrize(
    ("gone", "options"),
    [
        ((0, 0, 0, 0), {}),
        ((0, 0, 3, 0), {}),  # 30 % after the masks are agreed: the bar
        ((3, 0, 2, 0), {}),
        ((0, 3, 0, 0), {}),
        ((0, 0, 0, 3), {}),
        ((1, 1, 1, 1), {"threshold": 0.5}),
        ((0, 0, 3, 0), {"signed": False}),
        ((0, 0, 3, 0), {"agreed": True}),
        ((1, 1, 1, 1), {"agreed": True, "threshold": 0.5}),
        ((0, 0, 1, 0), {"n": 3, "threshold": 0.5, "least": 2}),
    ],
    ids=str,
)
def test_the_sum_is_the_plain_one(gone: tuple[int, int, int, int], options: dict[str, Any]) -> None:
    made = Round(**options)
    if "least" in options:
        made.clients = {name: made.client(name, least=2) for name in made.names}
    made.run(gone)
    assert made.server.ready()
    made.right(made.names[sum(gone[:3]) :])


def test_a_hundred_with_few_neighbours_each() -> None:
    made = Round(100, size=20, degree=20, threshold=0.5, seed=3)
    made.keys(made.names)
    made.share(made.names[::-1])
    gone = set(np.random.default_rng(1).permutation(made.names)[:20])
    left = [name for name in made.names if name not in gone]
    made.mask(left)
    made.reveal(left)
    made.right(left)
    roster = unpack(unpack(made.roster, Signed).body, Roster)
    graph = secure_terms.Graph(roster, 20)
    for name in made.names:
        assert len(set(graph.holders(name))) == 21
        assert all(name in graph.holders(peer) for peer in graph.holders(name))


def test_a_clip_and_a_cap_hold_what_one_client_can_do() -> None:
    made = Round(5, size=4)
    name = made.names[2]
    made.values[name] = np.array([5, -9, 0.25, 1], np.float32)
    made.samples[name] = 10**9
    made.run()
    assert made.clients[name].clipped == 2
    made.values[name] = np.array([1, -1, 0.25, 1], np.float32)
    made.samples[name] = 1000
    made.right(made.names)


def test_numbers_never_overflow() -> None:
    for n in (2, 10, 1000, 10**6):
        fixed = fixed_point.FixedPoint(n, 0.37, 1000)
        low, _ = fixed.write(np.array([-9.0, 9.0, 0.0]), 1000)
        whole = low.astype(np.uint64) * n % 2**32  # the worst case: all of them at the edge
        values, samples = fixed.read(whole.astype(np.uint32))
        np.testing.assert_allclose(values, [-0.37 * 1000 * n, 0.37 * 1000 * n, 0], rtol=1e-12)
        assert samples == 1000 * n
    with pytest.raises(ConfigError, match="32 bits"):
        fixed_point.FixedPoint(10**6, 1, 10**4)
    for clients, clip, most in ((3, 0.0, 5), (3, float("nan"), 5), (3, 1.0, 0), (0, 1.0, 5)):
        with pytest.raises(ConfigError):
            fixed_point.FixedPoint(clients, clip, most)
    good = fixed_point.FixedPoint(3, 1.0, 5)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="no sum"):
            good.write(np.array([value]), 1)
    with pytest.raises(ConfigError, match="samples"):
        good.write(np.zeros(1), 0)


class TestTooFew:
    """Below the threshold it stops, in each phase, at either side."""

    def test_of_keys(self) -> None:
        made = Round(3)
        made.server.key(made.clients[made.names[0]].keys())
        refused("few", made.server.roster)

    @pytest.mark.parametrize("phase", [1, 2])
    def test_of_shares_and_of_numbers(self, phase: int) -> None:
        made = Round(10)
        gone = [0, 0, 0, 0]
        gone[phase] = 4
        refused("few", lambda: made.run(tuple(gone)))  # type: ignore[arg-type] # four of them

    def test_of_what_is_revealed(self) -> None:
        made = Round(10)
        made.run((0, 0, 2, 2))
        assert not made.server.ready()
        assert made.server.waiting == made.names[2:4]
        refused("few", made.server.total)
        made.reveal(made.names[3:4])
        assert made.server.ready()
        made.right(made.names[2:])

    def test_a_client_takes_part_in_no_small_sum(self) -> None:
        made = Round(3, least=3)
        wary = made.client(made.names[0], least=5)
        made.clients[made.names[0]] = wary
        made.keys(made.names)
        refused("few", lambda: wary.share(made.roster))

    def test_a_client_gives_no_small_sum_away(self) -> None:
        made = Round(10)
        made.run((0, 0, 0, 10))
        roster = unpack(unpack(made.roster, Signed).body, Roster).digest
        for count in (1, 2, 6):
            small = say(Survivors(roster, made.names, made.names[:count]), made.signer)
            refused("few", made.clients[made.names[0]].reveal, small)


class TestMalice:
    """A coordinator that does not keep to the protocol, or somebody on the way."""

    def test_both_shares_are_never_given(self) -> None:
        made = Round(10)
        made.run((0, 0, 0, 10))
        victim, asked = made.names[9], made.clients[made.names[0]]
        roster = unpack(unpack(made.roster, Signed).body, Roster).digest
        first = asked.reveal(made.survivors)
        assert first == asked.reveal(made.survivors)  # the same question has the same answer
        without = say(Survivors(roster, made.names, made.names[:9]), made.signer)
        refused("both", lambda: asked.reveal(without))
        given = unpack(first, Reveal)
        assert victim in given.self_masks
        assert not set(given.self_masks) & set(given.mask_keys)
        again = made.client(made.names[0], kept=asked.snapshot())  # nor after a restart
        refused("both", lambda: again.reveal(without))
        assert again.reveal(made.survivors) == first

    def test_two_lists_to_two_halves_give_neither(self) -> None:
        """The coordinator tells five clients that the victim is alive and four that it is not: it gets too few of both."""
        made = Round(10, threshold=0.5)
        made.run((0, 0, 0, 10))
        victim, others = made.names[9], made.names[:9]
        roster = unpack(unpack(made.roster, Signed).body, Roster).digest
        lists = [say(Survivors(roster, made.names, names), made.signer) for names in (made.names, others)]
        own, mask = [], []
        for i, name in enumerate(others):
            given = unpack(made.clients[name].reveal(lists[i % 2]), Reveal)
            own += [name] if victim in given.self_masks else []
            mask += [name] if victim in given.mask_keys else []
        assert len(own) + len(mask) == 9
        assert min(len(own), len(mask)) < made.terms.needed(10)

    def test_nothing_is_revealed_before_enough_have_signed_the_same_list(self) -> None:
        made = Round(10, agreed=True)
        made.keys(made.names)
        made.share(made.names)
        made.mask(made.names)
        one = made.clients[made.names[0]]
        signed = {}
        for name in made.names:
            payload = made.clients[name].agree(made.survivors)
            made.server.agree(payload)
            signed[name] = unpack(payload, Agreement).signature

        def offer(signatures: dict[str, bytes]) -> bytes:
            return one.reveal(made.survivors, say(Agreements(signatures), made.signer))

        refused("garbled", one.reveal, made.survivors)
        refused("few", offer, dict(list(signed.items())[:6]))
        refused("signature", offer, {**signed, made.names[1]: signed[made.names[2]]})
        refused("unknown", offer, {**signed, "nobody": signed[made.names[2]]})
        forged = pack(Agreement(made.names[1], signed[made.names[2]]))
        refused("signature", made.server.agree, forged)
        refused("unknown", made.server.agree, pack(Agreement("nobody", b"")))
        # who signed one list signs, and reveals by, no other; so no two lists get enough signatures
        roster = unpack(unpack(made.roster, Signed).body, Roster).digest
        other = say(Survivors(roster, made.names, made.names[:9]), made.signer)
        refused("both", one.agree, other)
        refused("both", one.reveal, other, made.server.agreements())
        assert made.server.waiting == made.names
        made.reveal(made.names)
        made.right(made.names)
        with pytest.raises(ConfigError, match="keys of their own"):
            made.client(made.names[0], devices=None)

    def test_a_client_that_was_shown_fewer_sharers_reveals_nothing(self) -> None:
        """A coordinator that hides some from one client, so that its masks are with few, meets its refusal afterwards."""
        made = Round(10)
        made.keys(made.names)
        made.share(made.names)
        name = made.names[0]
        inbox = unpack(unpack(made.inboxes[name], Signed).body, Inbox)
        made.inboxes[name] = say(Inbox(name, inbox.roster, dict(list(inbox.boxes.items())[:6])), made.signer)
        made.mask(made.names)
        refused("changed", made.clients[name].reveal, made.survivors)

    def test_other_rosters_are_refused(self) -> None:
        made = Round(10)
        made.keys(made.names)
        roster = unpack(unpack(made.roster, Signed).body, Roster)
        name = made.names[0]
        foreign = Key(
            made.names[4], Pair(secrets.token_bytes(16), b"").public, Pair(secrets.token_bytes(16), b"").public
        )
        client = made.clients[name]

        def offer(keys: list[Key], context: bytes = roster.context, signer: Signer | None = made.signer) -> bytes:
            return client.share(say(Roster(context, keys), signer))

        refused("signature", lambda: offer(roster.keys, signer=Signer()))
        refused("signature", lambda: offer(roster.keys, signer=None))
        refused("terms", lambda: offer(roster.keys, context=bytes(32)))
        refused("few", lambda: offer(roster.keys[:2]))
        refused("changed", lambda: offer(roster.keys[1:]))
        refused("garbled", lambda: offer(roster.keys[::-1]))
        refused("garbled", lambda: offer([*roster.keys, roster.keys[-1]]))
        refused("signature", lambda: offer([foreign if key.client == foreign.client else key for key in roster.keys]))
        stranger = msgspec.structs.replace(
            roster.keys[5], client="gateway-0055", mask=foreign.mask, channel=foreign.channel
        )
        refused("unknown", lambda: offer([*roster.keys[:6], stranger, *roster.keys[7:]]))
        twin = msgspec.structs.replace(roster.keys[5], client="gateway-0055")
        refused("garbled", lambda: offer([*roster.keys[:6], twin, *roster.keys[7:]]))
        refused("garbled", lambda: client.share(b"nonsense"))
        refused("garbled", client.share, pack(Signed(b"", b""))[:-1])
        first = offer(roster.keys)
        assert offer(roster.keys) == first
        refused("changed", lambda: offer(roster.keys[:9]))
        again = made.client(name, kept=client.snapshot())
        assert again.share(made.roster) == first

    def test_keys_of_others_are_refused(self) -> None:
        made = Round(5)
        name, other = made.names[:2]
        key = unpack(made.clients[name].keys(), Key)
        for reason, wrong in (
            ("signature", msgspec.structs.replace(key, client=other)),
            ("signature", msgspec.structs.replace(key, mask=key.channel)),
            ("signature", msgspec.structs.replace(key, signature=b"")),
            ("unknown", msgspec.structs.replace(key, client="nobody")),
            ("garbled", msgspec.structs.replace(key, mask=b"short")),
        ):
            refused(reason, made.server.key, pack(wrong))
        # a signature of another round does not count
        later = Client(name, msgspec.structs.replace(made.terms, round=8), signer=made.signers[name])
        refused("signature", lambda: made.server.key(later.keys()))
        made.server.key(pack(key))
        made.server.key(pack(key))
        refused("changed", lambda: made.server.key(made.client(name).keys()))

    def test_tampered_boxes_are_refused(self) -> None:
        made = Round(5)
        made.keys(made.names)
        made.share(made.names)
        name = made.names[0]
        inbox = unpack(unpack(made.inboxes[name], Signed).body, Inbox)

        def offer(boxes: dict[str, bytes], client: str = name) -> Array:
            body = Inbox(client, inbox.roster, boxes)
            return made.clients[name].mask(say(body, made.signer), made.values[name], 5)

        peer = made.names[1]
        box = inbox.boxes[peer]
        for changed in (box[:-1] + bytes([box[-1] ^ 1]), inbox.boxes[made.names[2]], b"", box + b"x"):
            refused("signature", offer, {**inbox.boxes, peer: changed})
        mine = unpack(unpack(made.inboxes[peer], Signed).body, Inbox).boxes[name]
        refused("signature", lambda: offer({**inbox.boxes, peer: mine}))  # our own box, sent back to us
        refused("unknown", lambda: offer({**inbox.boxes, "nobody": box}))
        refused("unknown", lambda: offer(inbox.boxes, client=peer))
        refused("few", lambda: offer({peer: box}))
        refused("signature", lambda: made.clients[name].mask(say(inbox, Signer()), made.values[name], 5))
        made.clients[name].mask(made.inboxes[name], made.values[name], 5)

    def test_one_mask_hides_one_vector_only(self) -> None:
        """Two vectors under one mask would give their difference; other neighbours under it, a mask."""
        made = Round(5, threshold=0.5)
        made.run((0, 0, 0, 5))
        name = made.names[0]
        client = made.clients[name]
        assert np.array_equal(
            client.mask(made.inboxes[name], made.values[name], made.samples[name]), made.vectors[name]
        )
        refused("changed", lambda: client.mask(made.inboxes[name], -made.values[name], made.samples[name]))
        refused("changed", lambda: client.mask(made.inboxes[name], made.values[name], made.samples[name] + 1))
        inbox = unpack(unpack(made.inboxes[name], Signed).body, Inbox)
        fewer = Inbox(name, inbox.roster, dict(list(inbox.boxes.items())[:3]))
        again = made.client(name, kept=client.snapshot())
        refused("changed", lambda: again.mask(say(fewer, made.signer), made.values[name], made.samples[name]))
        assert np.array_equal(again.mask(made.inboxes[name], made.values[name], made.samples[name]), made.vectors[name])

    def test_what_comes_too_early_or_out_of_place(self) -> None:
        made = Round(5)
        client = made.clients[made.names[0]]
        nobody = say(Survivors(bytes(32), made.names, made.names), made.signer)
        refused("early", lambda: client.reveal(nobody))
        refused(
            "early",
            lambda: client.mask(say(Inbox(client.name, bytes(32), {}), made.signer), made.values[client.name], 1),
        )
        refused("early", lambda: made.server.share(pack(Shares(client.name, bytes(32), b"", {}))))
        refused("early", made.server.total)
        made.keys(made.names)
        client.share(made.roster)
        roster = unpack(unpack(made.roster, Signed).body, Roster).digest
        refused("early", lambda: client.reveal(say(Survivors(roster, made.names, made.names), made.signer)))
        refused("changed", lambda: client.reveal(nobody))
        newcomer = Signer()
        made.server = Server(
            made.terms, devices={**(made.devices or {}), "new": newcomer.public}, kept=made.server.snapshot()
        )
        refused("late", made.server.key, Client("new", made.terms, signer=newcomer).keys())

    def test_wrong_shares_are_got_round_or_noticed(self) -> None:
        made = Round(10, threshold=0.5)
        made.run((0, 0, 2, 8))
        liar = made.names[5]
        for name in made.names[2:9]:
            given = unpack(made.clients[name].reveal(made.survivors), Reveal)
            if name == liar:
                given = Reveal(
                    name,
                    given.roster,
                    dict.fromkeys(given.self_masks, bytes(17)),
                    dict.fromkeys(given.mask_keys, b"\1" * 17),
                )
            made.server.reveal(pack(given))
        made.right(made.names[2:])
        strict = Round(10)
        strict.run((0, 0, 0, 10))
        for name in strict.names[:7]:
            given = unpack(strict.clients[name].reveal(strict.survivors), Reveal)
            if name == strict.names[0]:
                given = Reveal(name, given.roster, dict.fromkeys(given.self_masks, bytes(17)), {})
            strict.server.reveal(pack(given))
        refused("shares", strict.server.total)

    def test_the_server_takes_only_what_fits(self) -> None:
        made = Round(5)
        made.keys(made.names)
        name = made.names[0]
        got = unpack(made.clients[name].share(made.roster), Shares)
        refused("changed", lambda: made.server.share(pack(msgspec.structs.replace(got, roster=bytes(32)))))
        refused("unknown", lambda: made.server.share(pack(msgspec.structs.replace(got, client="nobody"))))
        refused("garbled", lambda: made.server.share(pack(msgspec.structs.replace(got, boxes={}))))
        refused("garbled", lambda: made.server.share(pack(msgspec.structs.replace(got, commitment=b""))))
        made.share(made.names)
        refused("changed", lambda: made.server.share(pack(msgspec.structs.replace(got, commitment=bytes(32)))))
        refused("unknown", lambda: made.server.masked("nobody", np.zeros(51, np.uint32)))
        for wrong in (
            np.zeros(50, np.uint32),
            np.zeros(51, np.int32),
            np.zeros(51, np.float32),
            np.zeros((51, 1), np.uint32),
        ):
            refused("garbled", made.server.masked, name, wrong)
        made.mask(made.names[:4])
        made.server.masked(name, np.ones(51, np.uint32))  # a repeat counts once, whatever it says
        refused("late", lambda: made.server.masked(made.names[4], np.ones(51, np.uint32)))
        made.reveal(made.names[:4])
        refused("unknown", lambda: made.server.reveal(pack(Reveal(made.names[4], got.roster, {}, {}))))
        refused("changed", lambda: made.server.reveal(pack(Reveal(name, got.roster, {}, {}))))
        made.right(made.names[:4])

    @pytest.mark.parametrize(
        "wrong",
        [
            {"threshold": 0.4},
            {"threshold": 1.0},
            {"least": 1},
            {"degree": 3},
            {"degree": -2},
            {"size": 0},
            {"clients": 2},
            {"clip": 0.0},
        ],
        ids=str,
    )
    def test_terms_that_keep_nothing_secret_are_refused(self, wrong: dict[str, Any]) -> None:
        good = Terms("j", 1, 1, 5, 10, 1.0, 100)
        terms = msgspec.structs.replace(good, **wrong)
        with pytest.raises(ConfigError):
            Client("a", terms)
        with pytest.raises(ConfigError):
            Server(terms)


class TestSecrecy:
    """All that was on the bus and all that the coordinator keeps, against one client's update."""

    def opened(self, gone: int = 3) -> tuple[Round, dict[str, Array]]:
        """A finished sum, and what its coordinator can do alone: take off every mask that it got to know."""
        made = Round(10, size=400, seed=9)
        made.run((0, 0, gone, 0))
        made.right(made.names[gone:])
        context, server = made.terms.context, made.server
        bare = {name: vector.copy() for name, vector in made.vectors.items()}
        masks = Masks(401)
        keys = {key.client: key for key in server._state.keys.values()}
        for name in server.alive:
            secret = server._secret(name, server._commitment, server._state.shares[name].commitment)
            masks.add(self_mask(secret, context), bare[name], -1)
        for name in made.names[:gone]:
            pair = server._pair(server._secret(name, server._public, keys[name].mask))
            for peer in server.alive:
                masks.add(pair_mask(pair, keys[peer].mask, context), bare[peer], -1 if peer < name else 1)
        return made, bare

    def test_only_the_sum_of_all_is_small(self) -> None:
        """Every combination of the vectors with -1, 0 and 1, all known masks taken off: but one, they are noise."""
        made, bare = self.opened()
        alive = made.server.alive
        table = np.stack([bare[name] for name in alive]).astype(np.int64)
        small = []
        for signs in itertools.product((-1, 0, 1), repeat=len(alive)):
            if not any(signs) or next(s for s in signs if s) < 0:
                continue
            mixed = (np.asarray(signs) @ table).astype(np.uint32).view(np.int32)
            # of numbers that are spread evenly over 32 bits, a weighted sum of 7 is at most 0.7 of it; and the mean tells
            if np.abs(mixed.astype(np.float64)).mean() < 0.8 * 2**30:
                small.append(signs)
        assert small == [(1,) * len(alive)]

    def test_a_masked_vector_is_even_over_all_numbers(self) -> None:
        made, bare = self.opened()
        for vectors in (made.vectors, bare):
            for vector in vectors.values():
                counts = np.bincount(vector.view(np.uint8), minlength=256)
                expected = counts.sum() / 256
                chi = float(((counts - expected) ** 2 / expected).sum())
                assert 255 - 6 * 22.6 < chi < 255 + 6 * 22.6  # chi-square with 255 degrees: mean 255, deviation 22.6
        one = made.names[5]
        written = made.terms.fixed().write(made.values[one], made.samples[one])[0]
        for vector in (made.vectors[one], bare[one]):
            assert abs(np.corrcoef(written.view(np.int32), vector.view(np.int32))[0, 1]) < 0.3

    def test_the_same_update_looks_different_every_time(self) -> None:
        made = [Round(5, size=400) for _ in range(2)]
        for one in made:
            one.run()
        for name in made[0].names:
            assert np.array_equal(made[0].values[name], made[1].values[name])
            same = int(np.count_nonzero(made[0].vectors[name] == made[1].vectors[name]))
            assert same <= 2  # of 401 numbers of 32 bits

    def test_a_late_vector_stays_masked(self) -> None:
        """Its keys with the others were given back, as it counted as lost; its own mask is still on it."""
        made = Round(10, size=400)
        made.keys(made.names)
        made.share(made.names)
        late = made.names[9]
        vector = made.clients[late].mask(made.inboxes[late], made.values[late], made.samples[late])
        made.mask(made.names[:9])
        refused("late", lambda: made.server.masked(late, vector))
        made.reveal(made.names[:9])
        made.right(made.names[:9])
        server, context = made.server, made.terms.context
        keys = {key.client: key for key in server._state.keys.values()}
        pair = server._pair(server._secret(late, server._public, keys[late].mask))
        masks = Masks(401)
        for peer in server.alive:
            masks.add(pair_mask(pair, keys[peer].mask, context), vector, -1 if late < peer else 1)
        written = made.terms.fixed().write(made.values[late], made.samples[late])[0]
        own = msgspec.msgpack.decode(made.clients[late].snapshot(), type=_ClientState).own
        assert int(np.count_nonzero(vector == written)) <= 2
        masks.add(self_mask(own, context), vector, -1)  # and nothing else was: with it, the update is bare
        assert np.array_equal(vector, written)
        assert late not in {name for reveal in server._state.reveals.values() for name in reveal.self_masks}

    def test_no_secret_is_on_the_bus_or_with_the_coordinator(self) -> None:
        made, _ = self.opened()
        everything = b"".join(made.seen) + made.server.snapshot()
        for name, client in made.clients.items():
            state = msgspec.msgpack.decode(client.snapshot(), type=_ClientState)
            for secret in (state.channel, state.mask, state.own):
                assert secret not in everything
            assert made.values[name].tobytes() not in everything
            alive = name in made.server.alive
            revealed = {bytes(share) for r in made.server._state.reveals.values() for share in r.self_masks.values()}
            both = [
                held
                for peer, c in made.clients.items()
                for held in [_held(c).get(name)]
                if held and peer in made.server.alive
            ]
            assert both
            for own, mask in both:  # one of the two was given back, never both
                assert (own in revealed) == alive
                assert (mask in everything) == (not alive)

    def test_shares_below_the_threshold_fit_every_secret(self) -> None:
        """With one share too few, any secret is as possible as the right one: for each there is a line through the shares."""
        secret = secrets.token_bytes(16)
        held = shares.split(secret, 4, 9)
        three = {i: held[i - 1] for i in (2, 5, 9)}
        for candidate in (bytes(16), b"\xff" * 16, secrets.token_bytes(16)):
            fourth = _through(
                {0: int.from_bytes(candidate, "little"), **{i: int.from_bytes(s, "little") for i, s in three.items()}},
                7,
            )
            assert shares.combine({**three, 7: fourth.to_bytes(shares.SIZE, "little")}) == candidate


def _held(client: Client) -> dict[str, tuple[bytes, bytes]]:
    return msgspec.msgpack.decode(client.snapshot(), type=_ClientState).held


def _through(points: dict[int, int], at: int) -> int:
    """The value at ``at`` of the line through the points (Lagrange), modulo the prime."""
    total = 0
    for x, y in points.items():
        term = y
        for other in points:
            if other != x:
                term = term * (at - other) * pow(x - other, -1, shares.PRIME) % shares.PRIME
        total += term
    return total % shares.PRIME


@settings(deadline=None, derandomize=True, max_examples=600)
@given(data=st.data())
def test_garbage_is_refused_by_both_sides(data: st.DataObject) -> None:
    """Messages that were cut or changed somewhere: nothing but our own error comes of them."""
    made, messages = _SPOILT
    client = made.client(made.names[0], kept=made.clients[made.names[0]].snapshot())
    fresh = made.client(made.names[0], coordinator=None)
    server = Server(made.terms, signer=made.signer, kept=made.server.snapshot())
    payload = bytearray(data.draw(st.sampled_from(messages)))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    wrong = bytes(payload[: data.draw(st.integers(0, len(payload)))]) if data.draw(st.booleans()) else bytes(payload)
    values = made.values[made.names[0]]
    for act in (
        fresh.share, client.share, lambda p: client.mask(p, values, 5), client.reveal, client.agree,
        server.key, server.share, server.agree, server.reveal,
    ):  # fmt: skip
        with suppress(SecureSumError):
            act(wrong)


class TestShares:
    """Shamir's shares."""

    @pytest.mark.parametrize(("needed", "count"), [(1, 1), (1, 3), (2, 2), (3, 5), (7, 10), (40, 60)])
    def test_any_that_suffice_give_it_back(self, needed: int, count: int) -> None:
        secret = secrets.token_bytes(16)
        held = dict(enumerate(shares.split(secret, needed, count), 1))
        rng = np.random.default_rng(0)
        for _ in range(10):
            chosen = rng.permutation(count)[:needed] + 1
            assert shares.combine({int(i): held[int(i)] for i in chosen}) == secret

    def test_one_too_few_do_not(self) -> None:
        secret = secrets.token_bytes(16)
        held = dict(enumerate(shares.split(secret, 3, 5), 1))
        for pair in itertools.combinations(held, 2):
            try:
                assert shares.combine({i: held[i] for i in pair}) != secret
            except ValueError:
                continue  # three of four times it is no secret at all

    def test_the_edges_of_the_field(self) -> None:
        for secret in (bytes(16), b"\xff" * 16):
            assert shares.combine(dict(enumerate(shares.split(secret, 2, 2), 1))) == secret
        for wrong in ((b"short", 1, 1), (bytes(16), 0, 1), (bytes(16), 3, 2)):
            with pytest.raises(ValueError, match="shares"):
                shares.split(*wrong)


class TestAgain:
    """Killed and started anew, at either side and in each phase."""

    def test_both_sides_go_on_where_they_were(self) -> None:
        made = Round(6, size=30)
        made.clients = {name: made.client(name, kept=c.snapshot()) for name, c in made.clients.items()}
        for act, names in ((made.keys, 0), (made.share, 0), (made.mask, 1), (made.reveal, 1)):
            act(made.names[names:])
            made.clients = {name: made.client(name, kept=c.snapshot()) for name, c in made.clients.items()}
            made.server = Server(made.terms, signer=made.signer, devices=made.devices, kept=made.server.snapshot())
        made.right(made.names[1:])

    def test_what_is_asked_twice_is_answered_the_same(self) -> None:
        made = Round(4)
        made.run()
        kept = made.server.snapshot()
        again = Server(made.terms, signer=made.signer, devices=made.devices, kept=kept)
        assert again.roster() == made.roster
        assert again.inboxes() == made.inboxes
        assert again.survivors() == made.survivors
        for name in made.names:
            made.server.reveal(made.clients[name].reveal(made.survivors))
        made.right(made.names)


class TestDegree:
    """How many neighbours suffice."""

    def test_it_grows_slowly(self) -> None:
        found = [degree_for(n, 0.5, 0.1, 0.05) for n in (100, 1_000, 10_000)]
        assert found == sorted(found)
        assert 20 < found[1] < 100
        assert found[2] < 2 * found[0]
        assert degree_for(10, 0.5, 0.3, 0.2) == 0  # so few: all with all

    def test_its_tails_are_those_of_drawing(self) -> None:
        rng = np.random.default_rng(0)
        drawn = rng.hypergeometric(30, 70, 20, size=200_000)
        assert secure_terms._tail(100, 30, 20, 9) == pytest.approx(float((drawn >= 9).mean()), abs=0.005)
        assert secure_terms._tail(100, 30, 20, 0) == pytest.approx(1)


def test_masks_are_the_same_everywhere() -> None:
    """Pinned: a client and a coordinator of another version must make the same ones."""
    context, one, two = bytes(range(32)), Pair(bytes(16), b"mask|x"), Pair(b"\1" * 16, b"mask|x")
    assert pair_mask(one, two.public, context) == pair_mask(two, one.public, context)
    out = np.zeros(3, np.uint32)
    Masks(3).add(self_mask(bytes(16), context), out, 1)
    assert (out.tolist(), commitment(bytes(16), context).hex()[:16], one.public.hex()[:16]) == PINNED
    Masks(3).add(self_mask(bytes(16), context), out, -1)
    assert not out.any()


def _spoilt() -> tuple[Round, list[bytes]]:
    made = Round(4, size=3, agreed=True, threshold=0.5)
    made.run()
    return made, [payload for payload in made.seen if len(payload) > 20]


_SPOILT = _spoilt()
PINNED = ([2066370896, 226241180, 1350616112], "76a8b785628a2dec", "587481ad9a6d2b2f")
