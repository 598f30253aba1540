"""Topics, units and errors: the small things that everything above leans on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import errors, topics
from schemas.errors import ConfigError, MissingError, PenstockError, Problem, did_you_mean
from schemas.units import duration, rate, size


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=20))
def test_any_text_becomes_a_level(text: str) -> None:
    made = topics.level(text)
    assert topics.is_level(made)
    assert topics.level(made) == made or made.strip("-") == ""


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("Line 3/Camera É", "line-3-camera"),
        ("a_b-c", "a_b-c"),
        ("", "-"),
        ("+/#", "-"),
        ("0x12AB", "0x12ab"),
        ("a\n", "a"),
    ],
)
def test_levels(text: str, made: str) -> None:
    assert topics.level(text) == made


@pytest.mark.parametrize("text", ["", "A", "a b", "a/b", "é", "a\n", "+", "#", "$x", "a.b"])
def test_what_is_no_level(text: str) -> None:
    assert not topics.is_level(text)


def test_every_topic_has_at_most_seven_levels() -> None:
    made = [
        topics.output("t", "n", "p", "So/ur ce"),
        topics.state("t", "n"),
        topics.ledger("t", "n"),
        topics.dead("t", "n"),
        topics.ack("t", "n", "p", "c"),
        topics.again("t", "n", "p", "out"),
    ]
    assert len(set(made)) == len(made)
    assert made[0] == "t/n/p/so-ur-ce"
    for topic in made:
        assert len(topic.split("/")) <= topics.MAX_LEVELS
        assert all(topics.is_level(level) for level in topic.split("/"))
        assert topic.split("/")[2] in topics.RESERVED_PORTS | {"p"}


@pytest.mark.parametrize(
    ("pattern", "topic", "expected"),
    [  # MQTT 5, 4.7.1 and 4.7.2
        ("sport/tennis/player1/#", "sport/tennis/player1", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
        ("sport/#", "sport", True),
        ("#", "a/b", True),
        ("sport/tennis/+", "sport/tennis/player1", True),
        ("sport/tennis/+", "sport/tennis/player1/ranking", False),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+/+", "/finance", True),
        ("/+", "/finance", True),
        ("+", "/finance", False),
        ("a/b", "a/b", True),
        ("a/b", "a/B", False),
        ("a", "a/b", False),
        ("a/b", "a", False),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
    ],
)
def test_filters(pattern: str, topic: str, expected: bool) -> None:
    assert topics.matches(pattern, topic) is expected


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("5ms", 5_000_000),
        ("10 s", 10**10),
        ("1.5min", 90 * 10**9),
        ("1h", 3600 * 10**9),
        ("2d", 172_800 * 10**9),
        (0, 0),
    ],
)
def test_durations(text: object, ns: int) -> None:
    assert duration(text) == ns


@pytest.mark.parametrize("wrong", [5, 1.5, "5", "ms", "5 parsec", "-5s", "", None, True, False, [], "5s 3s", "infs"])
def test_what_is_no_duration(wrong: object) -> None:
    with pytest.raises(ValueError, match="expected a duration with a unit"):
        duration(wrong)


@pytest.mark.parametrize("wrong", ["1e99999s", "300000d", "1e300ns"])
def test_durations_fit_64_bits(wrong: str) -> None:
    with pytest.raises(ValueError, match="expected a duration that fits 64 bits"):
        duration(wrong)


@pytest.mark.parametrize(("text", "octets"), [("20MB", 20_000_000), ("1 KiB", 1024), ("0.5kB", 500), (7, 7), (0, 0)])
def test_sizes(text: object, octets: int) -> None:
    assert size(text) == octets


@pytest.mark.parametrize("wrong", [-1, 1.5, "20", "20 mb", True, None])
def test_what_is_no_size(wrong: object) -> None:
    with pytest.raises(ValueError, match="expected a size with a unit"):
        size(wrong)


@pytest.mark.parametrize(
    ("text", "per_second"), [("30/s", 30.0), ("90 / min", 1.5), ("1/h", 1 / 3600), (5, 5.0), (0.5, 0.5)]
)
def test_rates(text: object, per_second: float) -> None:
    assert rate(text) == per_second


@pytest.mark.parametrize("wrong", [0, -1, "0/s", "30", "30/d", True, None, float("nan"), float("inf")])
def test_what_is_no_rate(wrong: object) -> None:
    with pytest.raises(ValueError, match="expected a rate"):
        rate(wrong)


def test_each_class_of_errors_owns_its_exit_code() -> None:
    codes = {
        name: error.exit_code
        for name, error in vars(errors).items()
        if isinstance(error, type) and issubclass(error, PenstockError)
    }
    assert codes["ConfigError"] == 2
    assert codes["MissingError"] == 3
    assert codes["ConnectError"] == codes["BusError"] == codes["DeniedError"] == 4
    assert codes["UnbalancedError"] == 5
    assert codes["RunError"] == codes["PenstockError"] == 1
    assert set(codes.values()) == {1, 2, 3, 4, 5}


def test_what_is_missing_says_how_to_get_it() -> None:
    assert (
        str(MissingError("PyAV", extra="camera"))
        == "PyAV is not installed; install it with: pip install 'penstock[camera]'"
    )
    assert str(MissingError("mosquitto")) == "mosquitto is not installed"


def test_problems_move_up_with_all_that_they_know() -> None:
    error = ConfigError(Problem(("a", 1), "m", offset=4, on_key=True), "n").under("x", 2)
    assert error.problems == (Problem(("x", 2, "a", 1), "m", 4, True), Problem(("x", 2), "n"))
    assert str(error) == "m; n"


@pytest.mark.parametrize(
    ("wrong", "known", "hint"),
    [
        ("ingst", ["ingest", "infer"], "; did you mean 'ingest'?"),
        ("zzz", ["b", "a"], "; known: a, b"),
        ("zzz", [], ""),
        ("zzz", [str(i) for i in range(13)], ""),
    ],
)
def test_hints(wrong: str, known: list[str], hint: str) -> None:
    assert did_you_mean(wrong, known) == hint
