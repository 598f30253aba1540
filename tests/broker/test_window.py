"""The delivery protocol: exactly once and in order over a link that loses, repeats, reorders, and whose ends die."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from broker.window import Ack, Knock, ReceiveWindow, RecentIds, SendWindow, pack, unpack_ack, unpack_knock

SECOND = 1_000_000_000


def window(consumers: dict[str, bool] | None = None, *, messages: int = 1024, size: int = 1 << 20) -> SendWindow:
    made = SendWindow(7, consumers or {"c": False}, messages=messages, size=size)
    for peer in made.peers.values():
        peer.heard = True
    return made


def push(sender: SendWindow, text: str, *, final: bool = False) -> int:
    seq = sender.next
    sender.push("t", text.encode(), 0, final=final)
    return seq


def test_control_messages_round_trip_and_refuse_what_is_none() -> None:
    ack = Ack(3, 9, 7, (11, 12), hello=True)
    assert unpack_ack(pack(ack)) == ack
    assert unpack_knock(pack(Knock(3, 5))) == Knock(3, 5)
    for junk in (b"", b"\xc1", b"\x93", b"\x80", b'{"a": 1}', b"\x92\xa1a\x01"):
        assert unpack_ack(junk) is None
        assert unpack_knock(junk) is None


def test_what_is_done_is_released_and_the_slowest_consumer_is_the_window() -> None:
    sender = window({"a": False, "b": False}, messages=2)
    push(sender, "x")
    push(sender, "y")
    assert not sender.room
    sender.heard("a", Ack(7, 2, 2), 0)
    assert not sender.room
    sender.heard("b", Ack(7, 2, 1), 0)
    assert sender.floor == 1
    assert len(sender.kept) == 1


def test_bytes_bound_the_window_too() -> None:
    sender = window(messages=100, size=10)
    push(sender, "12345")
    push(sender, "12345")
    full = sender.room
    sender.heard("c", Ack(7, 1, 1), 0)
    assert (full, sender.room, sender.bytes) == (False, True, 5)


def test_what_a_durable_outbox_does_not_hold_yet_is_not_sent_again() -> None:
    sender = window()
    sender.committed = 0
    for text in ("x", "y", "z"):
        push(sender, text)
    sender.committed = 2
    hello = sender.heard("c", Ack(7, 0, 0, hello=True), 0)[1]
    assert [k.seq for k in hello] == [1, 2]
    assert [k.seq for k in sender.heard("c", Ack(7, 0, 0, (1, 2, 3)), SECOND)[1]] == [1, 2]
    assert [k.seq for k in sender.heard("c", Ack(7, 0, 0, answer=True), SECOND)[1]] == [1, 2]
    sender.committed = 3
    assert [k.seq for k in sender.heard("c", Ack(7, 0, 0, answer=True), 60 * SECOND)[1]] == [1, 2, 3]


def test_a_consumer_of_another_numbering_is_told_ours() -> None:
    sender = window()
    push(sender, "x")
    knock, again = sender.heard("c", Ack(0, 0, 0, hello=True), 0)
    assert knock == Knock(7, 1)
    assert again == []
    receiver = ReceiveWindow()
    receiver.knocked(Knock(7, 1))
    _, again = sender.heard("c", receiver.ack(answer=True), 0)
    assert [k.seq for k in again] == [1]


def test_a_restarted_consumer_gets_again_what_it_had_not_done() -> None:
    sender = window()
    for text in "abcd":
        push(sender, text)
    sender.heard("c", Ack(7, 4, 2), 0)
    _, again = sender.heard("c", Ack(7, 2, 2, hello=True), SECOND)
    assert [k.payload for k in again] == [b"c", b"d"]


def test_missing_numbers_are_sent_again_but_not_twice_at_once() -> None:
    sender = window()
    for text in "abc":
        push(sender, text)
    ack = Ack(7, 0, 0, (1, 2))
    assert [k.seq for k in sender.heard("c", ack, SECOND)[1]] == [1, 2]
    assert sender.heard("c", ack, SECOND + 1)[1] == []
    assert [k.seq for k in sender.heard("c", ack, 2 * SECOND)[1]] == [1, 2]


def test_who_makes_no_progress_is_asked_and_sent_what_it_says_it_lacks() -> None:
    sender = window()
    push(sender, "a")
    push(sender, "b")
    assert sender.due(SECOND // 2) == []
    assert sender.due(SECOND) == ["c"]
    assert sender.due(2 * SECOND) == []
    assert sender.due(3 * SECOND) == ["c"]
    assert [k.seq for k in sender.heard("c", Ack(7, 1, 0, answer=True), 3 * SECOND)[1]] == [2]
    assert sender.due(4 * SECOND) == ["c"]  # an answer that shows progress begins the second anew
    sender.heard("c", Ack(7, 2, 2), 4 * SECOND)
    assert sender.due(60 * SECOND) == []


def test_a_lost_acknowledgement_of_the_last_message_is_asked_for() -> None:
    sender = window()
    push(sender, "a")
    sender.heard("c", Ack(7, 1, 0), 0)  # it has arrived; that it is done was said too, and lost
    assert sender.due(SECOND) == ["c"]
    assert sender.heard("c", Ack(7, 1, 1, answer=True), SECOND) == (None, [])
    assert sender.floor == 1


def test_who_is_gone_for_hours_costs_a_question_every_two_seconds_and_no_data() -> None:
    sender = window()
    for text in "abc":
        push(sender, text)
    questions = sum(len(sender.due(now)) for now in range(0, 3600 * SECOND, SECOND // 4))
    assert questions <= 3600 // 2 + 1
    assert sender.resent == 0


def test_what_never_arrives_is_sent_again_ever_more_rarely() -> None:
    """A broker that lets small messages through and drops ours."""
    sender = window()
    for text in "abc":
        push(sender, text)
    times = [
        now // SECOND
        for now in range(0, 600 * SECOND, SECOND // 4)
        if sender.due(now) and sender.heard("c", Ack(7, 0, 0, answer=True), now)[1]
    ]
    gaps = [late - early for early, late in pairwise(times)]
    assert gaps == sorted(gaps)
    assert gaps[0] <= 2
    assert all(gap <= 18 for gap in gaps)
    assert sender.resent <= 3 * (600 // 16 + 6)
    sender.anew(600 * SECOND)  # the link was lost and is there again
    assert sender.heard("c", Ack(7, 0, 0, answer=True), 600 * SECOND)[1]


def test_a_fast_consumer_keeps_nothing_back_but_the_end() -> None:
    sender = window({"slow": False, "fast": True})
    push(sender, "a")
    sender.heard("slow", Ack(7, 1, 1), 0)
    assert sender.floor == 1
    push(sender, "end", final=True)
    sender.heard("slow", Ack(7, 2, 2), 0)
    assert sender.floor == 1
    assert sender.due(SECOND) == ["fast"]
    assert [k.seq for k in sender.heard("fast", Ack(7, 0, 0, answer=True), SECOND)[1]] == [2]
    receiver = ReceiveWindow()
    assert receiver.jump(7, 2)
    assert not receiver.jump(7, 2)
    receiver.finish(7, 2)
    sender.heard("fast", receiver.ack(), SECOND)
    assert sender.floor == 2


def test_a_consumer_that_left_for_good_is_waited_for_no_more() -> None:
    sender = SendWindow(9, {"c": False}, earlier=[5])
    push(sender, "a")
    sender.heard("c", Ack(4, 3, 3, ended=True), 0)  # of some other run: means nothing
    assert sender.floor == 0
    sender.heard("c", Ack(5, 3, 3, ended=True), 0)
    assert sender.floor == 1
    assert sender.waiting == []


def test_a_consumer_seen_to_leave_is_waited_for_no_more() -> None:
    sender = window({"a": False, "b": False})
    push(sender, "x")
    sender.heard("b", Ack(7, 1, 1), 0)
    sender.left("stranger")
    assert sender.floor == 0
    sender.left("a")
    assert sender.floor == 1


def test_an_old_incarnation_is_ignored() -> None:
    receiver = ReceiveWindow()
    assert receiver.accept(5, 1, "a") == ["a"]
    assert receiver.accept(4, 2, "b") == []
    assert receiver.accept(6, 1, "c") == ["c"]
    receiver.finish(5, 1)
    assert receiver.done == 0
    assert receiver.repeated == 1


def test_early_arrivals_are_bounded() -> None:
    receiver = ReceiveWindow(limit=2)
    for seq in (5, 6, 7, 8):
        assert receiver.accept(1, seq, seq) == []
    assert receiver.knocked(Knock(1, 5)) == [5, 6]


def test_recent_ids_forget_the_oldest() -> None:
    ids = RecentIds(2, ["a"])
    assert not ids.add("a")
    assert ids.add("b")
    assert ids.add("c")
    assert not ids.add("b"), "two are known in any case"
    assert ids.add("d")
    assert ids.add("a"), "and four at most"
    assert len(ids) <= 4


def test_identities_are_remembered_all_or_none() -> None:
    ids = RecentIds(4, ["a"])
    assert not ids.add_all(["b", "a"])
    assert not ids.add_all(["b", "c", "b"])
    assert "b" not in ids
    assert ids.add_all(["b", "c", "d", "e", "f"])
    assert not ids.add_all(["g", "f"])
    ids.discard("f")
    assert ids.add_all(["g", "f"])
    assert not ids.add("c")


class Site:
    """A producer, a bad link and a consumer, with a clock; ends may die and come back with what they had committed."""

    def __init__(self, seed: int, total: int, *, kill_producer: bool, kill_consumer: bool) -> None:
        self.random = random.Random(seed)
        self.total = total
        self.kill_producer = kill_producer
        self.kill_consumer = kill_consumer
        self.now = 0
        self.epoch = 1
        self.effects: list[int] = []
        self.to_consumer: list[tuple[int, int, int] | Knock] = []
        self.to_producer: list[Ack] = []
        self.committed_position = 0
        self.committed: tuple[int, int, list[str]] = (0, 0, [])
        self.start_producer()
        self.start_consumer()

    def start_producer(self) -> None:
        self.sender = SendWindow(self.epoch, {"c": False}, messages=16)
        self.epoch += 1
        self.numbers: dict[int, int] = {}
        self.position = self.committed_position
        self.to_consumer.append(Knock(self.sender.epoch, self.sender.base))

    def start_consumer(self) -> None:
        epoch, done, ids = self.committed
        self.receiver = ReceiveWindow(epoch=epoch, done=done, limit=32)
        self.ids = RecentIds(64, ids)
        self.queue: list[tuple[int, int, int]] = []
        self.to_producer.append(self.receiver.ack(hello=True))

    def link(self, queue: list, message: object, *, bad: bool) -> None:  # type: ignore[type-arg] # either way
        roll = self.random.random() if bad else 1.0
        if roll < 0.15:
            return
        queue.insert(self.random.randrange(len(queue) + 1) if roll < 0.3 else len(queue), message)
        if 0.3 <= roll < 0.4:
            queue.append(message)

    def step(self, *, bad: bool) -> None:
        self.now += SECOND // 10
        while self.sender.room and self.position < self.total and self.random.random() < 0.8:
            self.position += 1
            self.numbers[self.sender.next] = self.position
            entry = (self.sender.epoch, self.sender.next, self.position)
            self.sender.push("t", str(self.position).encode(), self.now)
            self.link(self.to_consumer, entry, bad=bad)
        arrivals, self.to_consumer = self.to_consumer, []
        for arrival in arrivals:
            if isinstance(arrival, Knock):
                self.queue += self.receiver.knocked(arrival)
                self.link(self.to_producer, self.receiver.ack(answer=True), bad=bad)
            else:
                self.queue += self.receiver.accept(arrival[0], arrival[1], arrival)
        if self.queue and self.random.random() < 0.7:
            done, self.queue = self.queue[:5], self.queue[5:]
            ids = list(self.committed[2])
            for _, _, value in done:
                if self.ids.add(str(value)):
                    self.effects.append(value)
                    ids.append(str(value))
            self.committed = (done[-1][0], done[-1][1], ids[-64:])  # one transaction with the effects
            for epoch, seq, _ in done:
                self.receiver.finish(epoch, seq)
        if self.receiver.changed or self.random.random() < 0.2:
            self.link(self.to_producer, self.receiver.ack(), bad=bad)
        acks, self.to_producer = self.to_producer, []
        for ack in acks:
            knock, again = self.sender.heard("c", ack, self.now)
            if knock:
                self.link(self.to_consumer, knock, bad=bad)
            for kept in again:
                self.link(self.to_consumer, (self.sender.epoch, kept.seq, int(kept.payload)), bad=bad)
        for _ in self.sender.due(self.now):
            self.link(self.to_consumer, Knock(self.sender.epoch, self.sender.base), bad=bad)
        self.committed_position = max(self.committed_position, self.numbers.get(self.sender.floor, 0))
        if bad and self.kill_producer and self.random.random() < 0.03:
            self.start_producer()
        if bad and self.kill_consumer and self.random.random() < 0.03:
            self.start_consumer()

    def run(self) -> None:
        for _ in range(300):
            self.step(bad=True)
        for _ in range(3000):
            if self.sender.floor == self.sender.next - 1 and self.position == self.total:
                return
            self.step(bad=False)
        raise AssertionError(f"stuck at {len(self.effects)} of {self.total}")


@pytest.mark.parametrize(
    ("kill_producer", "kill_consumer"), [(False, False), (False, True), (True, False), (True, True)]
)
def test_every_message_has_its_effect_once_and_in_order(kill_producer: bool, kill_consumer: bool) -> None:
    for seed in range(200):
        site = Site(seed, 200, kill_producer=kill_producer, kill_consumer=kill_consumer)
        site.run()
        assert site.effects == list(range(1, 201)), f"seed {seed}"


@pytest.mark.parametrize("seconds", [1, 10, 100])
def test_an_edge_moves_again_within_two_seconds_after_its_link_is_back(seconds: int) -> None:
    """Nobody notices the gap: neither end reconnects, everything that is sent in it is lost, whenever it begins."""
    for seed in range(40):
        site = Site(seed, 10_000, kill_producer=False, kill_consumer=False)
        for _ in range(random.Random(seed).randrange(1, 60)):
            site.step(bad=True)
        for _ in range(10 * seconds):
            site.step(bad=False)
            site.to_consumer.clear()
            site.to_producer.clear()
        effects, resent = len(site.effects), site.sender.resent
        back = site.now
        while len(site.effects) <= effects:
            site.step(bad=False)
            assert site.now - back < 25 * SECOND // 10, f"seed {seed}"
        assert site.sender.resent - resent <= 2 * 16, f"seed {seed}: more than the window twice"
