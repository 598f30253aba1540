"""Joint learning: gateways give a part of their examples to a trainer, sealed; the two machines, killed anywhere, lied to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from job_site import Deaths, parts

from nodes.federated import pool_wire, wire
from nodes.federated.examples import Example, ExampleStore
from nodes.federated.giver import Giver
from nodes.federated.machine import Say
from nodes.federated.outbox import Outbox
from nodes.federated.pool import Pool
from nodes.federated.pool_wire import Batch, Bundle
from nodes.federated.rules import SECOND
from nodes.federated.virtual import BEGAN, Fault, Link, Peer, World
from nodes.privacy.keys import SEED, Signer, derive
from nodes.privacy.sealing import Opener, seal_for
from nodes.trainers._trainer import Examples
from schemas.errors import SinkAwayError

DATA = parts(3, rows=60)
NEAR = Link(0.01)
TRAINER = Signer(b"t" * 32)
DEVICES = {name: Signer(name.encode() * 32) for name in "abc"}
PUBLIC = {name: signer.public for name, signer in DEVICES.items()}


def given(examples: Examples, name: str = "m") -> list[Example]:
    return [
        Example(f"{name}{i}", BEGAN + i, x, int(y)) for i, (x, y) in enumerate(zip(examples.x, examples.y, strict=True))
    ]


class Site:
    """A pool and its gateways on a virtual bus; what is on disks outlives the machines."""

    def __init__(
        self,
        *,
        signer: Signer | None = TRAINER,
        devices: dict[str, bytes] | None = PUBLIC,
        link: Link = NEAR,
        fault: Fault | None = None,
        took: float = 0.0,
        keep: int = 5000,
        **fits: Callable[[Example], None],
    ) -> None:
        self.examples = ExampleStore(None, keep=keep, policy="balanced")
        self.said: list[tuple[str, Say]] = []
        self.news: list[tuple[str, dict[str, Any]]] = []
        self.link, self.took = link, took
        self.world = World(0, lambda peer, say: self.said.append((peer.name, say)))
        fit = fits.get("fits", lambda example: None)

        def make() -> Pool:
            return Pool(
                "j",
                self.examples,
                fit,
                signer=signer,
                devices=devices,
                on_news=lambda what, told: self.news.append((what, told)) if what else None,
            )

        self.pool = self.world.add("trainer", make, link=link, fault=fault, took=lambda machine, work: took)
        self.givers: dict[str, Peer] = {}
        self.outboxes: dict[str, Outbox] = {}

    def gateway(
        self,
        name: str,
        examples: list[Example] | None = None,
        *,
        outbox: Outbox | None = None,
        fault: Fault | None = None,
        ends: bool = True,
        **more: Any,
    ) -> Peer:
        box = self.outboxes[name] = outbox or self.outboxes.get(name) or Outbox(None)
        options = {"signer": DEVICES[name], "trainer": TRAINER.public, "linger": 1.0, **more}
        now = self.world.now
        box.consent(now) if options.get("gives", True) else box.withdraw(now)
        box.add(examples or [])

        def make() -> Giver:
            giver = Giver("j", name, box, **options)
            if ends:
                giver._ends = True
            return giver

        peer = self.world.add(name, make, link=self.link, fault=fault)
        self.givers[name] = peer
        return peer

    def absent(self) -> None:
        """The trainer is gone, and the broker has forgotten what it said."""
        self.wait(0.001)
        self.world.kill(self.pool)
        self.world.retained.clear()

    def give(self, name: str, examples: list[Example]) -> None:
        self.outboxes[name].add(examples)
        peer = self.givers[name]
        if isinstance(peer.machine, Giver):
            self.world._apply(peer, peer.machine.fed(self.world.now))

    def run(self, seconds: float = 1000) -> bool:
        return self.world.run(lambda: all(peer.over for peer in self.givers.values()), seconds=seconds)

    def wait(self, seconds: float) -> None:
        end = self.world.now + int(seconds * SECOND)
        self.world.after(seconds, lambda: None)
        self.world.run(lambda: self.world.now >= end)

    def ids(self) -> list[str]:
        return sorted(ident for (ident,) in self.examples._db.execute("SELECT id FROM examples"))

    def gift(self, name: str) -> dict[str, Any]:
        kept: dict[str, Any] = msgspec.msgpack.decode(self.pool.disk[f"gift/{name}"])
        return kept

    def machine(self) -> Pool:
        assert isinstance(self.pool.machine, Pool)
        return self.pool.machine

    def answers(self, name: str) -> list[pool_wire.Answer]:
        found = [say.payload for who, say in self.said if who == "trainer" and say.topic == f"p/{name}/ack"]
        return [pool_wire.hear(pool_wire.Answer, unsigned(payload)) for payload in found]


def unsigned(payload: bytes) -> bytes:
    signed = wire.signed(payload)
    return payload if signed is None else signed.message


def of(name: str, examples: list[Example]) -> list[str]:
    return sorted(f"{name}/{example.id}" for example in examples)


# -- what is given arrives, once ------------------------------------------------------------------------------------


def test_what_gateways_give_is_in_the_pool_with_its_labels() -> None:
    site = Site()
    for k, name in enumerate("abc"):
        site.gateway(name, given(DATA[k]))
    assert site.run()
    assert site.ids() == sorted(ident for k, name in enumerate("abc") for ident in of(name, given(DATA[k])))
    found = site.examples.to_learn()
    wanted = {x.tobytes(): y for k in range(3) for x, y in zip(DATA[k].x, DATA[k].y, strict=True)}
    assert all(wanted[x.tobytes()] == y for x, y in zip(found.x, found.y, strict=True))
    assert [site.gift(name)["examples"] for name in "abc"] == [len(part) for part in DATA]
    assert all(box.count == box.bytes == 0 for box in site.outboxes.values())


def test_nothing_on_the_bus_can_be_read_and_only_the_trainer_opens_it() -> None:
    site = Site()
    site.gateway("a", given(DATA[0], "secret-name-"), inline=500, chunk=300)
    site.gateway("b", given(DATA[1], "secret-name-"))
    assert site.run()
    bus = b"".join(say.payload for _, say in site.said)
    for k in range(2):
        for row in DATA[k].x:
            for at in range(0, row.nbytes, 16):
                assert row.tobytes()[at : at + 16] not in bus
    assert b"secret-name" not in bus
    payload = next(say.payload for who, say in site.said if who == "b" and say.topic == "p/b/up")
    batch = pool_wire.hear(Batch, payload)
    about = pool_wire.about("j", "b", batch.life, batch.number)
    opener = Opener(derive(TRAINER.private(), b"penstock|pool|opener", SEED))
    assert len(pool_wire.unpack(opener.open(batch.data, about, PUBLIC["b"]), "b", numbers=False)) == len(DATA[1])


SMALL: dict[str, Any] = {"batch": 3000, "inline": 60_000}
LARGE: dict[str, Any] = {"batch": 6000, "inline": 500, "chunk": 700}


@pytest.fixture(scope="module", params=[SMALL, LARGE], ids=["messages", "blobs"])
def counted(request: pytest.FixtureRequest) -> tuple[dict[str, Any], int, int]:
    """How many points there are at which each side could die."""
    trainer, gateway = Deaths(), Deaths()
    site = Site(fault=trainer)
    site.gateway("a", given(DATA[0]), fault=gateway, **request.param)
    assert site.run()
    return request.param, trainer.points, gateway.points


def killed(options: dict[str, Any], trainer: Fault | None, gateway: Fault | None, link: Link = NEAR) -> Site:
    site = Site(fault=trainer, link=link)
    site.gateway("a", given(DATA[0]), fault=gateway, **options)
    assert site.run(5000)
    assert site.ids() == of("a", given(DATA[0]))
    assert site.gift("a")["examples"] == len(DATA[0]), "each is counted once"
    numbers = {answer.number for answer in site.answers("a")}
    assert site.gift("a")["upto"] == max(numbers) > 2
    return site


def test_killed_at_any_point_each_example_is_there_once(counted: tuple[dict[str, Any], int, int]) -> None:
    options, trainer, gateway = counted
    assert trainer > 10 < gateway
    for point in range(trainer):
        killed(options, Deaths([point]), None)
    for point in range(gateway):
        site = killed(options, None, Deaths([point]))
        said = {say.payload for who, say in site.said if (who, say.topic) == ("a", "p/a/up")}
        numbers = {pool_wire.hear(Batch, payload).number for payload in said}
        assert len(said) <= len(numbers) + 1, "a repeat has the same bytes, unless it died when it had its answer"


@pytest.mark.parametrize("seed", range(6))
def test_on_a_bad_link_with_deaths_on_both_sides(seed: int) -> None:
    drawn = np.random.default_rng(seed)
    trainer, gateway = (Deaths(drawn.choice(200, 6, replace=False).tolist(), 3.0) for _ in range(2))
    killed(SMALL if seed % 2 else LARGE, trainer, gateway, Link(0.2, jitter=0.5, loss=0.2, twice=0.2))


def test_a_trickle_is_gathered_and_a_flood_is_not_waited_for() -> None:
    site = Site()
    site.gateway("a", ends=False, linger=10.0, batch=20 * (DATA[0].x[0].nbytes + 64))
    for k, example in enumerate(given(DATA[0])[:30]):
        site.world.after(1.0 + k, site.give, "a", [example])
    site.wait(200)
    assert len(site.ids()) == 30
    assert 3 <= len({answer.number for answer in site.answers("a")}) <= 4, "about ten in each"
    site.give("a", given(DATA[1], "x")[:45])
    site.wait(0.5)
    assert len(site.ids()) == 70, "two whole batches at once; the rest waits for more"
    site.wait(20)
    assert len(site.ids()) == 75


def test_a_trainer_that_is_away_is_waited_for_within_the_budget(tmp_path: Path) -> None:
    takes = DATA[0].x[0].nbytes + 64
    box = Outbox(tmp_path / "box.sqlite", size=10 * takes)
    site = Site()
    site.absent()
    site.gateway("a", given(DATA[0]), outbox=box, ends=False)
    site.wait(100)
    assert (box.count, box.full) == (10, len(DATA[0]) - 10)
    assert not any(who == "a" for who, _ in site.said), "nothing is said to nobody"
    box.close()
    again = Outbox(tmp_path / "box.sqlite", size=10 * takes)
    assert again.count == 10
    site.world.kill(site.givers["a"])
    site.gateway("a", outbox=again)
    site.world.begin(site.pool)
    assert site.run()
    assert site.ids() == of("a", given(DATA[0])[:10])


def test_another_key_of_the_trainer_the_same_examples_once() -> None:
    """The batch that was sealed to the old one cannot be opened: another is made, of the same number."""
    site = Site()
    old, new = site.pool, Signer(b"n" * 32)
    site.gateway("a", given(DATA[0]), trainer=None, ends=False, **SMALL)
    site.wait(1.02)  # a batch was sealed and said, nothing answered yet
    site.world.kill(old)
    life = site.outboxes["a"].life
    site.pool = site.world.add(
        "other", lambda: Pool("j", site.examples, lambda example: None, signer=new, devices=PUBLIC), link=site.link
    )
    site.wait(60)
    assert site.ids() == of("a", given(DATA[0]))
    assert site.gift("a")["life"] == life


# -- who may, and what is refused -----------------------------------------------------------------------------------


def test_without_consent_nothing_leaves_and_nothing_is_kept() -> None:
    box = Outbox(None)
    box.add(given(DATA[0]))
    assert box.count == 0
    assert box.next(0, 10_000) is None
    box.consent(BEGAN)
    box.add(given(DATA[0]))
    assert box.count == len(DATA[0])


@pytest.mark.parametrize(
    ("trainer", "gateway", "said"),
    [
        ({"signer": None, "devices": None}, {}, None),  # a signed answer is wanted, so nobody is believed
        ({"signer": None, "devices": None}, {"trainer": None}, "'plain' is not allowed"),
        ({}, {"signer": None, "plain": True}, "there is no key here"),
        ({"signer": Signer(b"x" * 32)}, {}, None),
        ({}, {"signer": Signer(b"y" * 32)}, "seal"),
        ({"devices": {"b": PUBLIC["b"]}}, {}, "unknown"),
    ],
    ids=["no-key", "plain-not-allowed", "gateway-without-key", "wrong-trainer", "wrong-device", "stranger"],
)
def test_without_the_right_keys_nothing_is_given_or_taken(
    trainer: dict[str, Any], gateway: dict[str, Any], said: str | None
) -> None:
    site = Site(**trainer)
    site.gateway("a", given(DATA[0]), **gateway)
    site.wait(300)
    assert site.ids() == []
    assert site.outboxes["a"].count == len(DATA[0]), "they wait until somebody has put it right"
    giver = site.givers["a"].machine
    assert isinstance(giver, Giver)
    if said is None:
        assert giver.garbage > 0
        assert not any(who == "a" for who, _ in site.said)
    else:
        assert said in giver.trouble


def test_plain_where_both_say_so() -> None:
    site = Site(signer=None, devices=None)
    site.gateway("a", given(DATA[0]), signer=None, trainer=None, plain=True)
    assert site.run()
    assert len(site.ids()) == len(DATA[0])
    assert DATA[0].x[0].tobytes() in b"".join(say.payload for _, say in site.said)


def box_for(name: str, examples: list[Example], life: int, number: int, **other: Any) -> bytes:
    """A batch as that device would seal it."""
    pool = Opener(derive(TRAINER.private(), b"penstock|pool|opener", SEED)).public
    data = other.get("data") or Bundle(number, examples).pack()
    about = pool_wire.about(other.get("job", "j"), other.get("named", name), life, other.get("inner", number))
    sealed = seal_for(pool, data, about, other.get("signer", DEVICES[name]))
    return pool_wire.say(Batch("j", life, number, sealed, sealed=True))


ROW = given(DATA[0])[0]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (box_for("a", [ROW], BEGAN, 1, signer=DEVICES["b"]), "seal"),
        (box_for("a", [ROW], BEGAN, 1, named="b"), "seal"),
        (box_for("a", [ROW], BEGAN, 1, job="k"), "seal"),
        (box_for("a", [ROW], BEGAN, 7, inner=1), "seal"),
        (pool_wire.say(Batch("j", BEGAN, 1, Bundle(1, [ROW]).pack())), "plain"),
        (pool_wire.say(Batch("k", BEGAN, 1, b"", sealed=True)), "job"),
        (pool_wire.say(Batch("j", BEGAN, 1, b"x" * 99, sealed=True)), "seal"),
        (pool_wire.say(Batch("j", BEGAN, 0, b"", sealed=True)), "stale"),
        (box_for("a", [], BEGAN, 1, data=b"\xc1"), "not-msgpack"),
        (box_for("a", [], BEGAN, 1, data=b"\x80"), "bad-body"),
        (box_for("a", [Example("i", 1, ROW.x * np.float32(np.nan), 0)], BEGAN, 1), "not-finite"),
        (box_for("a", [Example("i", 1, ROW.x, -1)], BEGAN, 1), "bad-body"),
        (box_for("a", [Example("i", 1, ROW.x, 0.5)], BEGAN, 1), "bad-body"),
        (box_for("a", [Example("i" * 600, 1, ROW.x, 0)], BEGAN, 1), "bad-body"),
        (box_for("a", [Example("i", 1, ROW.x[:3], 0)], BEGAN, 1), "form"),
        (b"", None),
        (b"\xc1garbage", None),
        (wire.say(wire.Ask(model="x")), None),
    ],
)
def test_what_is_not_what_it_should_be_is_refused_with_its_reason(payload: bytes, reason: str | None) -> None:
    site = Site()
    site.examples.add([Example("b/0", 1, ROW.x, 0)])
    site.wait(1)
    site.world.inject("p/a/up", payload)
    site.wait(1)
    assert site.ids() == ["b/0"]
    assert [answer.reason for answer in site.answers("a")] == ([] if reason is None else [reason])
    assert "gift/a" not in site.pool.disk
    assert site.machine().garbage == (reason is None)


def test_a_class_that_the_model_does_not_know_is_refused_and_the_next_batch_comes() -> None:
    def fits(example: Example) -> None:
        if example.y > 1:
            raise ValueError(f"the class {example.y}; the model knows 0 to 1")

    site = Site(fits=fits)
    wrong = [example for example in given(DATA[0]) if example.y == 2][:5]
    right = [example for example in given(DATA[0]) if example.y < 2][:5]
    site.gateway("a", wrong, ends=False)
    site.wait(10)
    site.give("a", right)
    site.wait(10)
    assert site.ids() == of("a", right)
    assert site.news == [
        ("a batch was refused", {"client": "a", "reason": "form: the class 2; the model knows 0 to 1"})
    ]
    assert site.outboxes["a"].count == 0


def test_replays_and_forgeries_change_nothing() -> None:
    site = Site(keep=20)
    site.gateway("a", given(DATA[0]))
    assert site.run()
    before, gift = site.ids(), site.gift("a")
    forged = pool_wire.say(pool_wire.Withdrawal("j", site.world.now + SECOND))
    for payload in (forged, pool_wire.sign(DEVICES["b"], "j", "p/a/withdraw", forged)):
        site.world.inject("p/a/withdraw", payload)
    for who, say in list(site.said):
        if who == "a":
            for name in "abc":  # also in another's name
                site.world.inject(say.topic.replace("p/a/", f"p/{name}/"), say.payload)
    site.wait(100)
    assert (site.ids(), site.gift("a")) == (before, gift)
    assert "gift/b" not in site.pool.disk
    assert site.machine().garbage == 2


def test_a_gateway_believes_only_its_trainer() -> None:
    site = Site()
    site.absent()
    site.gateway("a", given(DATA[0]), ends=False)
    liar = Signer(b"l" * 32)
    opened = pool_wire.say(pool_wire.Opened("j", Opener().public))
    for payload in (
        opened,
        pool_wire.sign(liar, "j", "pool", opened),
        pool_wire.sign(TRAINER, "j", "p/a/ack", opened),
        b"x",
    ):
        site.world.inject("pool", payload)
    site.wait(100)
    assert not any(who == "a" for who, _ in site.said)
    site.world.begin(site.pool)
    site.wait(0.03)  # it is on its way
    life = site.outboxes["a"].life
    taken = pool_wire.say(pool_wire.Answer(life, 1, pool_wire.TAKEN))
    site.world.kill(site.pool)
    for payload in (taken, pool_wire.sign(liar, "j", "p/a/ack", taken)):
        site.world.inject("p/a/ack", payload)
    site.wait(100)
    assert site.outboxes["a"].count == len(DATA[0]), "nothing is forgotten before the trainer has it"


def test_too_large_a_blob_is_not_begun() -> None:
    site = Site()
    site.wait(1)
    site.world.inject("p/a/offer", wire.say(wire.Parcel(BEGAN, 1, "0" * 64, 1 << 40, 65536)))
    site.world.inject("p/z/offer", wire.say(wire.Parcel(BEGAN, 1, "0" * 64, 1000, 1000)))
    site.wait(1)
    assert [answer.status for answer in site.answers("a")] == [pool_wire.REFUSED]
    assert [answer.reason for answer in site.answers("z")] == ["unknown"]


def test_a_disk_that_is_full_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site()
    add, full = site.examples.add, [True]

    def sometimes(examples: list[Example]) -> None:
        if full:
            raise SinkAwayError("database or disk is full")
        add(examples)

    monkeypatch.setattr(site.examples, "add", sometimes)
    site.gateway("a", given(DATA[0]))
    site.wait(20)
    assert site.ids() == []
    assert {what for what, _ in site.news} == {"a batch was not kept"}
    full.clear()
    assert site.run()
    assert site.ids() == of("a", given(DATA[0]))


# -- withdrawal -----------------------------------------------------------------------------------------------------


def test_who_withdraws_is_forgotten_and_a_batch_of_before_stays_out() -> None:
    site = Site()
    for k, name in enumerate("ab"):
        site.gateway(name, given(DATA[k]), ends=name == "b")
    site.wait(10)
    assert len(site.ids()) == len(DATA[0]) + len(DATA[1])
    old = [say for who, say in site.said if who == "a"]
    site.world.kill(site.givers["a"])
    site.gateway("a", given(DATA[2], "more-"), gives=False)
    assert site.run()
    assert site.ids() == of("b", given(DATA[1]))
    assert site.outboxes["a"].count == 0
    assert ("consent withdrawn, examples forgotten", {"client": "a", "examples": len(DATA[0])}) in site.news
    for say in old:
        site.world.inject(say.topic, say.payload)
    site.wait(10)
    assert site.ids() == of("b", given(DATA[1]))
    assert site.answers("a")[-1].reason == "withdrawn"
    site.gateway("a", given(DATA[2], "again-"))  # another consent
    assert site.run()
    assert site.ids() == sorted(of("a", given(DATA[2], "again-")) + of("b", given(DATA[1])))
    withdrawal = next(say for who, say in site.said if who == "a" and say.topic == "p/a/withdraw")
    site.world.inject(withdrawal.topic, withdrawal.payload)  # an old one says nothing of a new consent
    site.wait(10)
    assert len(site.ids()) == len(DATA[1]) + len(DATA[2])


def test_withdrawing_survives_every_death_and_a_trainer_that_is_away() -> None:
    def withdrawn(trainer: Fault | None, gateway: Fault | None, away: float) -> None:
        site = Site()
        site.gateway("a", given(DATA[0]))
        site.gateway("b", given(DATA[1]))
        assert site.run()
        site.pool.fault = trainer
        site.world.kill(site.pool)
        site.world.after(away, site.world.begin, site.pool)
        site.gateway("a", gives=False, fault=gateway)
        assert site.run(5000)
        assert site.ids() == of("b", given(DATA[1]))
        assert site.gift("a")["until"] == site.outboxes["a"].until

    trainer, gateway = Deaths(), Deaths()
    withdrawn(trainer, gateway, 5.0)
    assert trainer.points >= 3 <= gateway.points
    for point in range(trainer.points):
        withdrawn(Deaths([point]), None, 5.0)
    for point in range(gateway.points):
        withdrawn(None, Deaths([point]), 5.0)


# -- what is chosen -------------------------------------------------------------------------------------------------


def test_a_part_is_drawn_by_identity_and_each_class_up_to_a_number(tmp_path: Path) -> None:
    many = [Example(f"m{i}", i, np.zeros(4, np.uint8), i % 4) for i in range(4000)]
    part = Outbox(None, part=0.1)
    part.consent(1)
    part.add(many)
    assert 320 < part.count < 480
    once = part.count
    part.add(many)
    assert part.count == once, "what comes twice is there once"
    path = tmp_path / "each.sqlite"
    each = Outbox(path, each=7)
    each.consent(1)
    each.add(many[:14])
    bundle = each.next(0, 1 << 20)
    assert bundle is not None
    assert each.next(bundle.number, 1 << 20) is None
    each.close()
    each = Outbox(path, each=7)
    each.add(many)
    labels = [example.y for example in bundle.examples] + [e.y for e in (each.next(0, 1 << 20) or bundle).examples]
    assert [labels.count(k) for k in range(4)] == [7] * 4, "also those that are gone are counted"
    each.withdraw(2)
    assert (each.count, each.life, each.until) == (0, 0, 2)
    each.consent(1)
    assert each.life == 3, "a consent is later than what withdrew the last one, whatever the clock says"


def test_examples_of_several_forms_wait_in_batches_of_their_own() -> None:
    box = Outbox(None)
    box.consent(1)
    box.add([Example(f"m{i}", i, np.zeros((3, 2) if i < 4 else 5, np.float32), 0) for i in range(6)])
    first = box.next(0, 1 << 20)
    assert first is not None
    second = box.next(first.number, 1 << 20)
    assert second is not None
    assert [len(first.examples), len(second.examples)] == [4, 2]
    assert first.examples[0].x.shape == (3, 2)
    assert second.examples[0].x.shape == (5,)


def test_what_was_given_or_withdrawn_is_on_the_gateways_disk_no_more(tmp_path: Path) -> None:
    secret = np.frombuffer(b"what nobody shall read again, 40 bytes..", np.uint8)
    box = Outbox(tmp_path / "box.sqlite")
    box.consent(1)
    box.add([Example("m", 1, secret, 0)])

    def files() -> bytes:
        return b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))

    assert secret.tobytes() in files()
    box.withdraw(2)
    assert secret.tobytes() not in files()
    box.close()
