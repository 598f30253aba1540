"""Models and updates too large for one message: the same rounds, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_site import PLAN, Deaths, Mean, Site, name, parts

from broker.blob_store import BlobStore
from broker.blobs import Chunk
from nodes.federated import desk, wire
from nodes.federated.rules import Rules
from nodes.federated.uploads import OnDisk, Place
from nodes.federated.virtual import Fault, Link

DATA = parts(3)
RULES = Rules(job="j", rounds=3, least=3, quorum=3, fit=PLAN, deadline=60)
SIZES = {"inline": 64, "chunk": 256}
"""Three chunks a model and an update: they are as small as chunks can be."""


def whole() -> bytes:
    site = Site(RULES, DATA)
    assert site.run()
    return site.model


MODEL = whole()


def topics(site: Site) -> dict[str, int]:
    out: dict[str, int] = {}
    for _, say in site.heard:
        kind = "blob/" if say.topic.startswith("blob/") else say.topic.split("/")[-1]
        out[kind] = out.get(kind, 0) + 1
    return out


def test_the_same_model_comes_of_chunks() -> None:
    site = Site(RULES, DATA, sizes=SIZES)
    assert site.run()
    assert site.model == MODEL
    seen = topics(site)
    assert "up" not in seen
    models = 4  # the one that it began with and three more: each said once, however many clients there are
    assert seen["blob/"] == models * 3
    assert seen["offer"] == 9
    assert seen["blob"] == 9 * 3
    assert all(len(say.payload) < 700 for _, say in site.heard)
    assert site.rows[0]["seconds"] < 1.3  # the first model was asked for
    for row in site.rows[1:]:  # no more ways there and back than without
        assert row["seconds"] == pytest.approx(1.04, abs=0.01)


def test_one_who_joins_later_asks_for_what_it_lacks() -> None:
    rules = Rules(job="j", rounds=3, least=2, quorum=2, fit=PLAN, deadline=60)
    site = Site(rules, DATA, sizes=SIZES, starts={name(2): 1.5})
    assert site.run()
    assert [row["clients"] for row in site.rows] == [2, 3, 3] or [row["clients"] for row in site.rows] == [2, 2, 3]


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    loss=st.sampled_from([0.0, 0.1, 0.3]),
    twice=st.sampled_from([0.0, 0.3]),
    jitter=st.sampled_from([0.0, 0.5]),
)
def test_on_a_poor_link_too(seed: int, loss: float, twice: float, jitter: float) -> None:
    rules = Rules(job="j", rounds=3, least=3, quorum=3, fit=PLAN, deadline=1e5, repeat=2.0)
    site = Site(rules, DATA, sizes=SIZES, seed=seed, link=Link(0.01, jitter, loss, twice))
    assert site.run()
    assert site.model == MODEL


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    points=st.sets(st.integers(0, 120), max_size=8),
    clients=st.lists(st.sets(st.integers(0, 40), max_size=4), min_size=3, max_size=3),
    back=st.sampled_from([0.0, 0.3, 5.0]),
)
def test_killed_anywhere_it_gives_the_same_bytes(points: set[int], clients: list[set[int]], back: float) -> None:
    faults: dict[str, Fault] = {name(k): Deaths(at, back) for k, at in enumerate(clients)}
    site = Site(RULES, DATA, fault=Deaths(points, back), client_faults=faults, sizes=SIZES)
    assert site.run()
    assert site.model == MODEL
    assert site.replay(None) == [(name(k), number) for number in (1, 2, 3) for k in range(3)]
    for k in range(3):
        assert len(set(site.fits(k))) == 3


@pytest.mark.parametrize("at", [0.5, 1.012, 1.02, 2.05])
def test_links_that_are_cut_in_the_middle_of_it(at: float) -> None:
    site = Site(RULES, DATA, sizes=SIZES)
    site.world.after(at, site.world.cut, site.clients[0], 3.0)
    site.world.after(at + 5, site.world.cut, site.lead, 3.0)
    assert site.run(seconds=200)
    assert site.model == MODEL


@pytest.mark.parametrize(
    ("parcel", "reason"),
    [
        (wire.Parcel(0, 1, "0" * 64, 10**10, 65536), "too-big"),
        (wire.Parcel(0, 1, "0" * 64, 10**12, 1 << 20), "too-big"),
        (wire.Parcel(0, 1, "nonsense", 600, 256), "bad-offer"),
        (wire.Parcel(0, 1, "0" * 64, 600, 0), "bad-offer"),
        (wire.Parcel(-1, 1, "0" * 64, 600, 256), "job"),
        (wire.Parcel(0, 7, "0" * 64, 600, 256), "future"),
    ],
)
def test_an_offer_of_something_else_is_refused(parcel: wire.Parcel, reason: str) -> None:
    site = Site(Rules(job="j", rounds=1, least=3, quorum=2, fit=PLAN), DATA, sizes=SIZES)
    site.world.run(seconds=0.1)
    site.world.kill(site.clients[2], will=1e9)
    run = wire.hear(wire.Call, site.world.retained["round"]).run
    site.world.inject("c/c002/offer", wire.say(wire.Parcel(run + parcel.run, *parcel.__reduce__()[1][1:])))
    assert site.run()
    acks = [wire.hear(wire.Ack, say.payload) for _, say in site.heard if say.topic == "c/c002/ack"]
    assert [(ack.status, ack.reason) for ack in acks] == [(wire.REFUSED, reason)]


def test_what_is_not_what_was_offered_is_refused_in_the_end() -> None:
    site = Site(Rules(job="j", rounds=1, least=3, quorum=3, fit=PLAN, deadline=20.0, retries=0), DATA, sizes=SIZES)
    site.world.run(seconds=0.1)
    site.world.kill(site.clients[2], will=1e9)
    run = wire.hear(wire.Call, site.world.retained["round"]).run
    site.world.inject("c/c002/offer", wire.say(wire.Parcel(run, 1, "0" * 64, 300, 256)))
    for k in range(5):
        for index, size in ((0, 256), (1, 44)):
            chunk = Chunk("0" * 64, index, memoryview(bytes(size))).encode()
            site.world.after(0.1 + k, site.world.inject, "c/c002/blob", chunk)
    assert site.run()
    assert [row["status"] for row in site.rows] == ["aborted"]


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("deaths", [(), range(5, 2000, 17)])
def test_updates_that_are_not_kept_in_memory_give_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, sums: bool, deaths: range | tuple[int, ...]
) -> None:
    class Likewise(Mean):
        """Says that it looks at each update once, or that it does not."""

    Likewise.sums = sums
    monkeypatch.setattr(desk, "SHELVE", 0)
    site = Site(RULES, DATA, strategy=Likewise, fault=Deaths(deaths))
    looked: list[int] = []
    monkeypatch.setattr(desk.Desk, "recall", _counted(desk.Desk.recall, looked))
    assert site.run()
    assert site.model == MODEL
    lead = site.leads[-1]
    assert all(not update.payload for update in lead.desk.taken.values())
    assert len(looked) == 9 if not deaths else len(looked) >= 9  # each read once, and again where it died over it


class Folder:
    """A place on the disk; each life of the coordinator opens it anew."""

    def __init__(self, path: Path) -> None:
        self.path, self.store = path, None

    store: BlobStore | None

    def __call__(self) -> Place:
        if self.store is not None:
            self.store.close()
        self.store = BlobStore(self.path, 1_000_000, durable=False)
        return OnDisk(self.store)


def sent_again(place: Callable[[], Place]) -> int:
    """Chunks of one client's uploads that were sent twice, where the coordinator died when two of three had arrived."""
    answers = 0

    def dies(point: str, what: str) -> float | None:
        nonlocal answers
        answers += point == "said" and what == "c/c001/have"
        return 0.5 if (point, what, answers) == ("said", "c/c001/have", 3) else None

    site = Site(RULES, DATA, place=place, fault=dies, sizes=SIZES)
    assert site.run()
    assert answers > 3
    assert site.model == MODEL
    sent = [Chunk.decode(say.payload) for _, say in site.heard if say.topic == "c/c001/blob"]
    return len(sent) - len({(chunk.digest, chunk.index) for chunk in sent})


def test_what_has_arrived_of_an_upload_outlives_the_coordinator_on_a_disk(tmp_path: Path) -> None:
    assert sent_again(Place) >= 4
    assert sent_again(Folder(tmp_path / "blobs")) <= 2


@settings(derandomize=True, max_examples=20, deadline=None)
@given(points=st.sets(st.integers(0, 120), max_size=8), loss=st.sampled_from([0.0, 0.2]))
def test_on_a_disk_too_killed_anywhere_it_gives_the_same_bytes(points: set[int], loss: float) -> None:
    with TemporaryDirectory() as path:
        rules = Rules(job="j", rounds=3, least=3, quorum=3, fit=PLAN, deadline=1e5, repeat=2.0)
        site = Site(
            rules, DATA, place=Folder(Path(path)), fault=Deaths(points), sizes=SIZES, link=Link(0.01, 0.0, loss)
        )
        assert site.run()
        assert site.model == MODEL


def _counted(function: Callable[..., Any], counts: list[int]) -> Callable[..., Any]:
    def counting(*given: Any) -> Any:
        counts.append(1)
        return function(*given)

    return counting
