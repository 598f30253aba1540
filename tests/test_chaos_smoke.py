"""The chaos campaign's command lives, and its verdict sees what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nodes.supervisor import NodeView, Outcome
from schemas.messages import Flow, Ledger

CHAOS = Path(__file__).parent / "chaos"
sys.path.append(str(CHAOS))

# what follows is found by the line before
import chaos_verdict as verdict  # noqa: E402
from chaos_schedule import VICTIMS, schedule  # noqa: E402

pytestmark = pytest.mark.campaign


@pytest.mark.slow
def test_a_short_campaign_ends_well() -> None:
    command = [sys.executable, str(CHAOS / "campaign.py"), "--smoke", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["ok"]
    (run,) = said["runs"]
    assert run["kills"] == dict.fromkeys(VICTIMS, 1)
    assert run["cuts"] == 1
    assert sum(run["restarts"].values()) >= 5
    assert len(run["recoveries"]) == 7


def test_a_campaign_that_takes_too_long_is_given_up_and_says_so() -> None:
    command = [sys.executable, str(CHAOS / "campaign.py"), "--smoke", "--json", "--within", "0.05"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    (run,) = json.loads(done.stdout)["runs"]
    assert any("not over within 3 s" in fault for fault in run["faults"]), run["faults"]


def test_a_seed_stands_for_one_schedule() -> None:
    one = schedule(7, "embedded", 100_000, 9, 6)
    assert one == schedule(7, "embedded", 100_000, 9, 6)
    assert one != schedule(8, "embedded", 100_000, 9, 6)
    assert one != schedule(7, "mosquitto", 100_000, 9, 6)
    killed = [blow.victim for blow in one if blow.kind == "kill"]
    assert {victim: killed.count(victim) for victim in VICTIMS} == dict.fromkeys(VICTIMS, 9)
    assert sum(blow.kind == "cut" for blow in one) == 6
    assert 65_000 < sum(blow.after for blow in one) <= 70_000  # all fall while there are data


def test_what_is_expected_is_right_for_data_small_enough_to_count_by_hand() -> None:
    assert verdict.kept(6) == [
        ("d1", 1_700_000_000 * 10**9, 1),
        ("d2", 1_700_000_000 * 10**9, 2),
        ("d0", 1_700_000_001 * 10**9, 4),
        ("d1", 1_700_000_001 * 10**9, 5),
    ]
    start = 1_699_999_980 * 10**9  # 20 s before the first reading, on the minute
    assert sorted(verdict.windows(verdict.kept(6))) == [
        ("d0", start, 0, 1, 4.0, 4.0, 4.0),
        ("d1", start, 0, 2, 6.0, 1.0, 5.0),
        ("d2", start, 0, 1, 2.0, 2.0, 2.0),
    ]


def test_the_verdict_names_what_is_lost_repeated_and_foreign() -> None:
    rows = verdict.kept(30)
    assert verdict.differences("readings", rows, reversed(rows)) == []
    assert verdict.differences("readings", rows, rows[1:]) == [f"1 readings missing, e.g. {rows[0]}"]
    assert verdict.differences("readings", rows, [*rows, rows[3]]) == [f"1 readings repeated, e.g. {rows[3]}"]
    foreign = ("d9", 1, 1)
    assert verdict.differences("readings", rows, [*rows, foreign]) == [f"1 readings that nobody sent, e.g. {foreign}"]


def outcome(**changed: Ledger) -> Outcome:
    """A run of 30 readings, of which 20 are kept, with 7 aggregates."""
    books = {
        "warm": Ledger(node="warm", received={"meter.out": Flow(messages=2, rows=30)}, passed=20, filtered=10),
        "means": Ledger(node="means", received={"warm.out": Flow(messages=2, rows=20)}, passed=20),
        "store": Ledger(node="store", received={"warm.out": Flow(messages=2, rows=20)}, passed=20),
        "report": Ledger(node="report", received={"means.out": Flow(messages=7, rows=7)}, passed=7),
        **changed,
    }
    views = {name: NodeView(name, "", "", name, state="ended", books=book) for name, book in books.items()}
    return Outcome(views, 1.0, complete=True)


def test_the_verdict_reads_the_books() -> None:
    assert verdict.books(outcome(), 30, 20, 7) == []
    late = Ledger(node="means", passed=19, dropped={"late": 1})
    assert verdict.books(outcome(means=late), 30, 20, 7) == [
        "ledger: means dropped {'late': 1}, dead {}, held 0",
        "ledger: means passed and filtered (19, 0), not (20, 0)",
    ]
    stopped = outcome()
    stopped.complete = False
    stopped.findings = ["warm: 3 rows too many"]
    assert verdict.books(stopped, 30, 20, 7) == ["ledger: warm: 3 rows too many", "the run did not complete"]
