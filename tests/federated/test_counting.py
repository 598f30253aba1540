"""Counts, histograms and quantiles over a fleet, as a user asks for them: processes, a broker, disks; killed at will."""

from __future__ import annotations

import math
import random
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import brokers
import numpy as np
import pytest
from harness import rows, run, until

from nodes.answer import Config as Answer
from nodes.answer import counting
from nodes.ask import Config as Ask
from nodes.federated.analytics import Question, places
from nodes.federated.counted import CountedRows, Rows
from nodes.federated.intake import Form, RefusedError, Taken, examine
from nodes.federated.questions import array_of, found
from nodes.federated.weights import shapes
from nodes.plan import prepare
from nodes.strategies._strategy import ClientUpdate
from nodes.strategies.sum import Sum
from nodes.supervisor import Supervisor
from nodes.trainers._trainer import Examples, Fit
from nodes.trainers.count import Count
from schemas.errors import ConfigError
from schemas.problems import validated

STATES = ("idle", "run", "fault", "odd")
QUESTIONS = "{state: [idle, run, fault], heat: {edges: {low: 0, high: 100, bins: 50}, quantiles: [0.5, 0.95]}}"
EDGES = np.linspace(0, 100, 51)


def fleet(folder: Path, gateways: int = 3, many: int = 300) -> dict[str, list[Any]]:
    """CSV files of so many gateways; what is in all of them together."""
    drawn = random.Random(4)
    whole: dict[str, list[Any]] = {"state": [], "heat": []}
    for k in range(gateways):
        lines = ["state,heat"]
        for _ in range(many + k):
            state, heat = drawn.choice(STATES), round(drawn.gauss(40 + 10 * k, 15), 2)
            whole["state"].append(state)
            whole["heat"].append(heat)
            lines.append(f"{state},{heat}")
        (folder / f"{k}.csv").write_text("\n".join(lines) + "\n")
    return whole


def topology(folder: Path, *, tell: str = "", ask: str = "", rate: str = "max", gateways: int = 3) -> Path:
    lines = ["topology: fleet", "brokers: {local: {run: mosquitto}}", "nodes:"]
    for k in range(gateways):
        lines += [
            f"  m-{k}: {{ingest: {{source: csv, path: {k}.csv, rate: {rate}, batch: 20}}, process: machines}}",
            f"  tell-{k}: {{answer: {{job: fleet, questions: {QUESTIONS}{tell}}}, from: {{m-{k}: {{delivery: safe}}}}}}",
        ]
    lines += [
        f"  ask: {{ask: {{job: fleet, questions: {QUESTIONS}, clients: {{least: {gateways}, quorum: {gateways}}}, {ask}}}}}",
        "  out: {uplink: {sink: sqlite, path: out.sqlite}, from: {ask: {delivery: safe}}}",
    ]
    path = folder / "fleet.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def answers(folder: Path, question: str, kind: str = "count") -> dict[str, float]:
    """What all answers together say of a question."""
    query = f"SELECT what, sum(value) FROM \"out\" WHERE question = '{question}' AND kind = '{kind}' GROUP BY what"  # noqa: S608
    try:
        return dict(rows(folder / "out.sqlite", query))
    except sqlite3.Error:
        return {}


def rounds(folder: Path) -> int:
    try:
        return int(rows(folder / "out.sqlite", 'SELECT count(DISTINCT round) FROM "out"')[0][0])
    except sqlite3.Error:
        return 0


@pytest.mark.skipif(bool(brokers.missing("mosquitto")), reason="mosquitto is not installed")
def test_each_row_is_in_one_answer_whoever_is_killed(tmp_path: Path) -> None:
    """Gateways and who asks die between and within rounds; the answers add up to the rows, exactly."""
    whole = fleet(tmp_path, many=800)
    total = len(whole["state"])

    async def meddle(supervisor: Supervisor) -> None:
        for victim in ("tell-0", "ask", "tell-1", "tell-0", "ask"):
            before = rounds(tmp_path)
            await until(lambda before=before: rounds(tmp_path) > before, within=25)  # type: ignore[misc] # its default
            supervisor.kill(victim)
        await until(lambda: sum(answers(tmp_path, "state").values()) >= total, within=40)
        supervisor.end()

    path = topology(tmp_path, ask="every: 200ms, deadline: 3s, retries: 1000", rate="200/s")
    outcome = run(path, meddle=meddle, within=58)
    assert outcome.complete
    assert outcome.findings == []
    there = Counter(whole["state"])
    expected = {"idle": there["idle"], "run": there["run"], "fault": there["fault"], "other": there["odd"]}
    assert answers(tmp_path, "state") == expected
    heat = answers(tmp_path, "heat")
    assert sum(heat.values()) == total
    exact = np.histogram(whole["heat"], EDGES)[0]  # the last bin has its upper edge, 100, which nobody reached
    assert [heat[f"{low:g} to {low + 2:g}"] for low in EDGES[:-1]] == exact.tolist()
    assert heat["below 0"] == sum(value < 0 for value in whole["heat"])
    assert rounds(tmp_path) > 5


@pytest.mark.skipif(bool(brokers.missing("mosquitto")), reason="mosquitto is not installed")
def test_a_window_is_in_every_answer_and_quantiles_are_within_their_bin(tmp_path: Path) -> None:
    whole = fleet(tmp_path)

    async def meddle(supervisor: Supervisor) -> None:
        def complete() -> bool:
            query = "SELECT round FROM \"out\" WHERE question = 'state' AND kind = 'count' GROUP BY round HAVING sum(value) = "
            try:
                return len(rows(tmp_path / "out.sqlite", query + str(len(whole["state"])))) >= 2
            except sqlite3.Error:
                return False

        await until(complete, within=40)
        supervisor.end()

    outcome = run(topology(tmp_path, tell=", window: 1h", ask="every: 200ms"), meddle=meddle)
    assert outcome.complete
    assert outcome.findings == []
    last = 'SELECT what, value FROM "out" WHERE kind = \'quantile\' AND round = (SELECT max(round) FROM "out")'
    said = dict(rows(tmp_path / "out.sqlite", last))
    assert said.keys() == {"p50", "p95"}
    for share, name in ((0.5, "p50"), (0.95, "p95")):
        exact = float(np.quantile(whole["heat"], share, method="inverted_cdf"))
        assert abs(said[name] - exact) <= 2, "the bins are 2 wide"


@pytest.mark.skipif(bool(brokers.missing("mosquitto")), reason="mosquitto is not installed")
def test_with_noise_the_budget_is_held_and_then_nothing_is_answered(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    from nodes.privacy.accountant import epsilon_of

    fleet(tmp_path)
    privacy = "privacy: {clip: 500, noise: 2.0, epsilon: 3}"
    outcome = run(topology(tmp_path, tell=", window: 1h", ask=f"every: 100ms, {privacy}"))
    assert outcome.complete
    assert outcome.findings == []
    spent = rows(tmp_path / "out.sqlite", 'SELECT DISTINCT round, epsilon FROM "out" ORDER BY round')
    many = len(spent)
    assert spent[-1][1] == pytest.approx(epsilon_of(((2.0, 1.0, many),), 1e-5))
    assert spent[-1][1] <= 3 < epsilon_of(((2.0, 1.0, many + 1),), 1e-5)
    values = [value for (value,) in rows(tmp_path / "out.sqlite", "SELECT value FROM \"out\" WHERE kind = 'count'")]
    assert any(value < 0 for value in values), "noise of 1,000 on each count"
    assert not any(value.is_integer() for value in values)


def wrong(folder: Path, *nodes: str) -> list[str]:
    (folder / "a.csv").write_text("state,heat\nidle,3\n")
    path = folder / "t.yaml"
    path.write_text("\n".join(["topology: t", "nodes:", "  m: {ingest: {source: csv, path: a.csv}}", *nodes]) + "\n")
    try:
        prepare(path)
    except ConfigError as error:
        return [str(line).partition(f"{path.name}:")[2] for line in getattr(error, "lines", ())]
    return []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("questions: {state: [idle]}", ""),
        ("questions: {x: {field: heat, edges: [0, 1], quantiles: [0.5]}}", ""),
        ("questions: {}", "at least 1"),
        ("questions: {stat: [idle]}", "no column 'stat'; did you mean 'state'?"),
        ("questions: {x: {field: hot, edges: [0, 1]}}", "no column 'hot'"),
        ("questions: {heat: {edges: [1, 0]}}", "edges increase"),
        ("questions: {heat: {edges: {low: 1, high: 0, bins: 3}}}", "low is less"),
        ("questions: {heat: {quantiles: [0.5]}}", "there must be edges"),
        ("questions: {heat: {}}", "either categories or edges"),
        ("questions: {state: {categories: [a], edges: [0, 1]}}", "either categories or edges"),
        ("questions: {state: {categories: [a], quantile: [0.5]}}", "unknown key 'quantile'; did you mean 'quantiles'?"),
        ("questions: {state: [idle]}, client: A/b", "expected a name of a-z"),
        ("questions: {state: [idle]}, trainer: mlp", "unknown key 'trainer'"),
    ],
)
def test_what_is_written_wrong_is_told(options: str, said: str, tmp_path: Path) -> None:
    lines = wrong(tmp_path, f"  a: {{answer: {{job: j, {options}}}, from: m}}")
    assert (len(lines) == 1 and said in lines[0]) if said else lines == [], lines


def test_both_sides_have_the_same_questions(tmp_path: Path) -> None:
    ask = "  q: {ask: {job: j, questions: {state: [idle, run]}}, publish: always}"
    lines = wrong(tmp_path, "  a: {answer: {job: j, questions: {state: [idle]}}, from: m}", ask)
    assert len(lines) == 1
    assert "not what is counted by 'q'" in lines[0]
    assert "questions.state.categories is ['idle', 'run'] there, ['idle'] here" in lines[0]
    second = ask.replace("  q:", "  r:")
    assert "'q' leads the job 'j' already" in wrong(tmp_path, ask, second)[0]
    budget = ask.replace("run]}", "run]}, privacy: {clip: 1, epsilon: 3}")
    assert "say 'rounds', or 'noise'" in wrong(tmp_path, budget)[0]


def counter(questions: dict[str, Any], **options: Any) -> tuple[Count, Any]:
    config = validated(Answer, {"job": "j", "questions": questions, **options})
    trainer = Count(counting(config).options)  # type: ignore[arg-type] # the trainer's own
    trainer.open()
    return trainer, config


def test_questions_that_differ_have_models_that_do(tmp_path: Path) -> None:
    forms = set()
    for questions in ({"heat": {"edges": [0, 1, 2]}}, {"heat": {"edges": [0, 1, 3]}}, {"hot": {"edges": [0, 1, 2]}}):
        trainer, _ = counter(questions)
        forms.add(tuple((shape.name, shape.shape) for shape in shapes(trainer.weights())))
    assert len(forms) == 3


def test_rows_count_once_and_only_when_their_answer_was_used(tmp_path: Path) -> None:
    trainer, config = counter({"state": ["a", "b"]})
    (name,) = config.all()
    store = CountedRows(tmp_path / "rows.sqlite", name, 1, keep=1000, window=None)
    trainer.settled = store.settle
    question = Question("state", ("a", "b"))

    def add(ident: str, values: list[str | None]) -> None:
        store.add([Rows(ident, np.arange(len(values)), places(question, values)[:, None])])

    def count(own: Any) -> tuple[list[float], Any]:
        trainer.load({name: np.zeros(3)})
        trainer.keep(own)
        trainer.fit(store.to_learn(), Fit())
        return trainer.weights()[name].tolist(), trainer.own()

    add("1", ["a", "a", "b", None, "x"])
    add("1", ["a", "a", "b", None, "x"])  # told again
    first, after = count({})
    assert first == [2, 1, 1]
    assert count({})[0] == [2, 1, 1], "that answer was not used"
    add("2", ["b"])
    assert count(after)[0] == [0, 1, 0]
    assert store.learnable == 1
    add("1", ["a", "a", "b", None, "x"])  # told again, long after it was counted
    assert count(after)[0] == [0, 1, 0]
    store.close()
    again = CountedRows(tmp_path / "rows.sqlite", name, 1, keep=1000, window=None)
    assert len(again.to_learn()) == 1
    again.close()
    other = CountedRows(tmp_path / "rows.sqlite", "another", 1, keep=1000, window=None)
    assert len(other.to_learn()) == 0, "its places were of other questions"
    other.close()


def test_rows_go_when_there_are_too_many_and_when_they_are_too_old(tmp_path: Path) -> None:
    import time

    store = CountedRows(None, "f", 1, keep=4, window=None)
    for k in range(3):
        store.add([Rows(str(k), np.arange(2), np.full((2, 1), k, np.int32))])
    assert store.to_learn().x.ravel().tolist() == [1, 1, 2, 2]
    assert store.displaced == 2
    store.close()
    now, hour = time.time_ns(), 3600 * 10**9
    store = CountedRows(None, "f", 1, keep=100, window=hour)
    store.add([Rows("old", np.array([now - 2 * hour, now - 2 * hour]), np.zeros((2, 1), np.int32))])
    store.add([Rows("both", np.array([now - 2 * hour, now]), np.array([[1], [2]], np.int32))])
    assert store.to_learn().x.ravel().tolist() == [2]
    store.close()


def test_sums_are_exact_and_go_into_rows(tmp_path: Path) -> None:
    ask = validated(Ask, {"job": "j", "questions": {"heat": {"edges": [0, 10], "quantiles": [0.5]}, "s": ["a"]}})
    heat, state = (array_of(name, asked.question(name, "rows")) for name, asked in ask.questions.items())
    strategy, model = Sum(), {heat: np.zeros(3), state: np.zeros(2)}
    one = {heat: np.array([1.0, 2, 3]), state: np.array([2.0**40, 1])}
    site = {heat: np.array([0.5, 1, 0]), state: np.array([0.0, 0.5])}  # the mean of two that a site between gathered
    new = strategy.aggregate(model, [ClientUpdate("a", one, 1), ClientUpdate("b", site, 2)])
    assert all((array == 0).all() for array in new.values()), "nobody hears what others counted"
    told: list[tuple[Any, ...]] = [tuple(each) for each in found(ask, strategy.answers())]
    assert told[1][:6] == ("heat", "count", "0 to 10", 0, 10, 4)
    assert [each[5] for each in told] == [2, 4, 3, 6.25, 2.0**40, 2]
    assert math.isnan(told[0][3])
    assert told[0][4] == 0


@pytest.mark.parametrize(("counts", "reason"), [([1.0, 2.0], ""), ([1.0, -5.0], "nonsense"), ([1.0, 1e12], "norm")])
def test_counts_that_are_none_are_refused(counts: list[float], reason: str) -> None:
    ask = validated(Ask, {"job": "j", "questions": {"s": ["a"]}})
    rules, strategy, model = ask.leading().rules(), ask.leading().chosen_strategy(), {"s": np.zeros(2)}
    update = Taken("a", 1, "base" * 4, 1, b"", {"s": np.array(counts)}, {})
    form = Form(shapes(model), (), None, strategy.fault)
    if not reason:
        return examine(update, "base" * 4, form, rules.limits, 1.0)
    with pytest.raises(RefusedError) as refused:
        examine(update, "base" * 4, form, rules.limits, 1.0)
    assert refused.value.reason == reason
    return None


def test_each_gateway_may_count_the_same() -> None:
    trainer, config = counter({"s": ["a", "b"]}, weigh="clients")
    (name,) = config.all()
    trainer.fit(Examples(np.array([[0], [0], [1], [-1]], np.int32), np.arange(1, 5)), Fit())
    assert trainer.weights()[name] == pytest.approx([2 / 3, 1 / 3, 0])
    ask = validated(Ask, {"job": "j", "questions": {"s": ["a", "b"]}, "weigh": "clients"})
    assert ask.leading().rules().limits.norm == pytest.approx(1)
