"""pydantic's errors in plain words, with paths into what the user wrote."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from schemas.errors import ConfigError, Problem
from schemas.problems import problems_of, shown, validated
from schemas.units import Duration, Rate, Size


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Inner(Strict):
    size: int = Field(1, ge=1, lt=100)
    named: str = Field("a", min_length=1, max_length=3, pattern="[a-z]+")


class Outer(Strict):
    whole: int = 0
    number: float = Field(0.0, gt=0.5, allow_inf_nan=False)
    flag: bool = False
    text: str = ""
    mode: Literal["fast", "safe"] = "safe"
    inner: Inner | None = None
    many: list[Inner] = []
    by_name: dict[str, Inner] = {}
    by_number: dict[int, Inner] = {}
    either: int | str | None = None
    shape: int | tuple[int, int] = 1
    part: Inner | list[Inner] | str | None = None
    few: list[int] = Field([1], min_length=1, max_length=2)
    wait: Duration = 0
    size: Size = 0
    rate: Rate = 1.0
    renamed: int = Field(0, alias="from")
    even: int = 0
    choice: Annotated[str, Field(max_length=2)] | None = None

    @field_validator("even")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd")
        return value


CASES: list[tuple[Any, list[tuple[tuple[str | int, ...], str]]]] = [
    ({"whole": "abc"}, [(("whole",), "expected a whole number, got 'abc'")]),
    ({"whole": 1.5}, [(("whole",), "expected a whole number, got 1.5")]),
    ({"whole": [1]}, [(("whole",), "expected a whole number, got a list")]),
    ({"whole": None}, [(("whole",), "expected a whole number, got nothing")]),
    ({"number": "x"}, [(("number",), "expected a number, got 'x'")]),
    ({"number": 0.5}, [(("number",), "expected more than 0.5, got 0.5")]),
    ({"number": float("nan")}, [(("number",), "expected a finite number, got nan")]),
    ({"flag": "maybe"}, [(("flag",), "expected true or false, got 'maybe'")]),
    ({"text": 5}, [(("text",), "expected a text, got 5")]),
    ({"text": True}, [(("text",), "expected a text, got true")]),
    ({"mode": "saef"}, [(("mode",), "expected 'fast' or 'safe', got 'saef'; did you mean 'safe'?")]),
    ({"mode": 3}, [(("mode",), "expected 'fast' or 'safe', got 3")]),
    ({"inner": 3}, [(("inner",), "expected a map, got 3")]),
    ({"inner": {"size": 0}}, [(("inner", "size"), "expected at least 1, got 0")]),
    ({"inner": {"size": 100}}, [(("inner", "size"), "expected less than 100, got 100")]),
    ({"inner": {"named": ""}}, [(("inner", "named"), "expected at least 1 character, got ''")]),
    ({"inner": {"named": "abcd"}}, [(("inner", "named"), "expected at most 3 characters, got 'abcd'")]),
    ({"inner": {"named": "A"}}, [(("inner", "named"), "'A' does not match [a-z]+")]),
    ({"inner": {"siez": 1}}, [(("inner", "siez"), "unknown key 'siez'; did you mean 'size'?")]),
    ({"many": {}}, [(("many",), "expected a list, got a map")]),
    ({"many": [{}, {"sise": 1}]}, [(("many", 1, "sise"), "unknown key 'sise'; did you mean 'size'?")]),
    ({"by_name": {"x": {"size": "y"}}}, [(("by_name", "x", "size"), "expected a whole number, got 'y'")]),
    ({"by_name": {"x": {"sze": 1}}}, [(("by_name", "x", "sze"), "unknown key 'sze'; did you mean 'size'?")]),
    ({"by_number": {"x": {}}}, [(("by_number", "x"), "expected a whole number, got 'x'")]),
    ({"by_number": {7: {"size": 0}}}, [(("by_number", 7, "size"), "expected at least 1, got 0")]),
    ({"either": [1]}, [(("either",), "expected a whole number or a text, got a list")]),
    ({"shape": "x"}, [(("shape",), "expected a whole number or a list, got 'x'")]),
    ({"shape": [1, "x"]}, [(("shape", 1), "expected a whole number, got 'x'")]),
    ({"part": {"size": 0}}, [(("part", "size"), "expected at least 1, got 0")]),
    ({"part": [{"sz": 0}]}, [(("part", 0, "sz"), "unknown key 'sz'; did you mean 'size'?")]),
    ({"part": 5}, [(("part",), "expected a map or a list or a text, got 5")]),
    ({"few": []}, [(("few",), "expected at least 1 item, got 0")]),
    ({"few": [1, 2, 3]}, [(("few",), "expected at most 2 items, got 3")]),
    ({"wait": 5}, [(("wait",), "expected a duration with a unit (ns, us, µs, ms, s, min, h, d), e.g. 10s, got 5")]),
    (
        {"size": "5 XB"},
        [(("size",), "expected a size with a unit (B, kB, KB, MB, GB, KiB, MiB, GiB), e.g. 20MB, got '5 XB'")],
    ),
    ({"rate": "0/s"}, [(("rate",), "expected a rate per s, min, h, e.g. 30/s, got '0/s'")]),
    ({"from": "x"}, [(("from",), "expected a whole number, got 'x'")]),
    ({"fron": 1}, [(("fron",), "unknown key 'fron'; did you mean 'from'?")]),
    ({"even": 3}, [(("even",), "3 is odd")]),
    ({"choice": "abc"}, [(("choice",), "expected at most 2 characters, got 'abc'")]),
    (
        {"whole": "a", "flag": 7, "zzz": 1},
        [
            (("whole",), "expected a whole number, got 'a'"),
            (("flag",), "expected true or false, got 7"),
            (("zzz",), "unknown key 'zzz'"),
        ],
    ),
    ("text", [((), "expected a map, got 'text'")]),
    (None, [((), "expected a map, got nothing")]),
]


@pytest.mark.parametrize(("value", "expected"), CASES, ids=[str(value) for value, _ in CASES])
def test_each_fault_is_one_problem(value: Any, expected: list[tuple[tuple[str | int, ...], str]]) -> None:
    with pytest.raises(ConfigError) as caught:
        validated(Outer, value)
    assert [(p.path, p.message) for p in caught.value.problems] == expected


def test_a_missing_key_and_a_wrong_key_of_a_map() -> None:
    class Needs(Strict):
        path: str
        by: dict[str, int] = {}

    with pytest.raises(ConfigError) as caught:
        validated(Needs, {"by": {3: 1}, "zzz": "x"})
    assert caught.value.problems == (
        Problem(("path",), "the key 'path' is missing"),
        Problem(("by", 3), "expected a text, got 3", on_key=True),
        Problem(("zzz",), "unknown key 'zzz'; known: by, path", on_key=True),
    )
    with pytest.raises(ConfigError) as caught:
        validated(Needs, {"pth": "x"})
    assert caught.value.problems == (Problem(("pth",), "unknown key 'pth'; did you mean 'path'?", on_key=True),)


def test_models_that_annotations_do_not_tell_serve_the_hint() -> None:
    class Wrapper(BaseModel):
        options: Any

        @field_validator("options")
        @classmethod
        def _inner(cls, value: Any) -> Inner:
            return Inner.model_validate(value)

    raw = {"options": {"siez": 1, "named": 5}}
    with pytest.raises(ValidationError) as caught:
        Wrapper.model_validate(raw)
    problems = problems_of(caught.value, Wrapper, raw, {("options",): Inner})
    assert [(p.path, p.message) for p in problems] == [
        (("options", "named"), "expected a text, got 5"),
        (("options", "siez"), "unknown key 'siez'; did you mean 'size'?"),
    ]


def test_problems_are_seen_from_further_up() -> None:
    with pytest.raises(ConfigError) as caught:
        validated(Inner, {"size": 0})
    assert caught.value.under("nodes", "a").problems[0].path == ("nodes", "a", "size")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "nothing"),
        (False, "false"),
        ({}, "a map"),
        ((), "a list"),
        ("x" * 99, repr("x" * 45 + "…")),
        (1.5, "1.5"),
    ],
)
def test_values_are_shown_as_they_were_written(value: Any, text: str) -> None:
    assert shown(value) == text
