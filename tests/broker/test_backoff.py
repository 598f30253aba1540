"""How long a client waits before it tries again: never long after a short absence, ever more rarely in a long one."""

from __future__ import annotations

from broker.backoff import QUICK, SHARE, STEADY, Backoff


def test_a_row_of_short_connections_ends_in_no_long_pause() -> None:
    backoff, now = Backoff(0.1, 30.0, 0.0), 0.0
    for _ in range(50):
        now += 0.5
        assert backoff.lost(0.5, now) <= QUICK
        pauses = [backoff.failed(now + i) for i in range(3)]
        assert max(pauses) <= QUICK
        now += 3
    assert min(pauses) >= QUICK / 2  # and yet nobody who is thrown out at once comes back ten times a second


def test_a_steady_connection_begins_the_pauses_anew() -> None:
    backoff = Backoff(0.1, 30.0, 0.0)
    for _ in range(20):
        backoff.failed(0.0)
    assert backoff.lost(STEADY, 100.0) <= 0.1
    assert backoff.failed(100.0) <= 0.2


def test_a_long_absence_is_prolonged_by_a_small_share_of_itself() -> None:
    backoff, now, attempts = Backoff(0.1, 30.0, 0.0), 0.0, 0
    while now < 24 * 3600:
        pause = backoff.failed(now)
        assert pause <= max(QUICK, now / SHARE)
        assert pause <= 30.0
        now += pause
        attempts += 1
    assert attempts < 24 * 3600 / 15 + 200  # half a minute, less a half at random, once it is long


def test_the_most_that_was_asked_for_is_kept_to() -> None:
    backoff = Backoff(0.01, 0.05, 0.0)
    assert max(backoff.failed(float(i)) for i in range(100)) <= 0.05
