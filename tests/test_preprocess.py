"""The node `preprocess`: its list of steps as people write it, what is said of mistakes, types through it, the books."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from steps_kit import CONTEXT, books, frame, only, operator, reading, table

from nodes import kinds, preprocess
from nodes.operator import Flow
from nodes.options import Options
from nodes.preprocess import Config
from schemas.errors import ConfigError
from schemas.messages import Frame, Message

DOCS = Path(__file__).parent.parent / "docs"


def problems(*steps: Any) -> list[tuple[tuple[str | int, ...], str]]:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"steps": list(steps)})
    return [(e["loc"], e["msg"]) for e in caught.value.errors(include_url=False)]


@pytest.mark.parametrize(
    ("step", "path", "part"),
    [
        (3, (), "expected a step"),
        (None, (), "expected a step"),
        ({}, (), "expected a step"),
        ({"a": 1, "b": 2}, (), "expected a step"),
        ("nope", (), "unknown step 'nope'"),
        ({"rezise": [1, 1]}, ("rezise",), "did you mean 'resize'"),
        ({"_step": 1}, ("_step",), "unknown step"),
        ("resize", ("size",), "required"),
        ({"resize": None}, ("resize", "size"), "required"),
        ({"resize": [96]}, ("resize",), "expected [width, height]"),
        ({"resize": [0, 4]}, ("resize", 0), "greater than or equal to 1"),
        ({"resize": {"size": [4, 4], "methd": "area"}}, ("resize", "methd"), "did you mean 'method'"),
        ({"derive": {"x": "a +"}}, ("derive", "x"), "found the end"),
        ({"derive": {"fields": {"x": "a +"}}}, ("derive", "fields", "x"), "found the end"),
        ({"filter": "a + 1"}, ("filter",), "expected a truth value"),
        ({"split": {"a": "x > 1", "b": "x >"}}, ("split", "b"), "found the end"),
        ({"throttle": 5}, ("throttle",), "with a unit"),
        ({"colour": "gray"}, ("colour",), "'grey'"),
        ({"quantise": {"scale": 0}}, ("quantise", "scale"), "greater than 0"),
        ({"quantise": {"scale": "1/x"}}, ("quantise", "scale"), "name 'x'"),
        ({"fill": {"x": [1]}}, ("fill", "x"), ""),
        ({"decode": {"fast": True}}, ("decode", "fast"), "unknown key 'fast'"),
    ],
)
def test_mistakes_are_where_they_were_written(step: Any, path: tuple[str | int, ...], part: str) -> None:
    for loc, message in problems({"throttle": "1s"}, step):
        assert loc[: 2 + len(path)] == ("steps", 1, *path)
        assert part in message
        assert "\n" not in message


def test_the_offset_of_an_expression_survives() -> None:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"steps": [{"derive": {"y": "1 + upper(3)"}}]})
    (error,) = caught.value.errors()
    assert (error["type"], error["ctx"]["offset"]) == ("expression", 10)


def test_every_mistake_is_named() -> None:
    assert len(problems({"resize": [0, -1]}, "nope", {"throttle": "x"})) == 4
    assert problems()[0][0] == ("steps",)


@given(st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
), st.sampled_from(kinds.names("step")))  # fmt: skip
@settings(deadline=None, derandomize=True, max_examples=300)
def test_only_validation_errors_from_any_options(options: Any, name: str) -> None:
    try:
        config = Config.model_validate({"steps": [{name: options}]})
    except ValidationError:
        return
    config.check(CONTEXT)
    for kind in ("readings/1", "frame/1"):
        try:
            config.emits([Flow(kind, frozenset("x"))], CONTEXT)
        except ConfigError as error:
            paths = [p.path for p in error.problems]
            assert all(p[:3] == ("steps", 0, name) for p in paths)


def test_types_must_follow() -> None:
    def emits(*steps: Any, inputs: list[Flow]) -> dict[str, Flow]:
        return Config.model_validate({"steps": list(steps)}).emits(inputs, CONTEXT)

    readings, frames = Flow("readings/1", frozenset("x")), Flow("frame/1")
    assert emits({"window": 4}, "fft", {"throttle": "1s"}, inputs=[readings]) == {"out": frames}
    for steps, inputs, path in (
        (({"resize": [4, 4]},), [readings], ("steps", 0, "resize")),
        (({"window": 4}, {"filter": "x > 1"}), [readings], ("steps", 1, "filter")),
        (({"throttle": "1s"}, "fft"), [frames, readings], ("steps", 1, "fft")),
    ):
        with pytest.raises(ConfigError) as caught:
            emits(*steps, inputs=inputs)
        assert caught.value.problems[0].path[: len(path)] == path or caught.value.problems[0].path == ("steps", 1)
    with pytest.raises(ConfigError, match="would send"):
        emits({"throttle": "1s"}, inputs=[readings, frames])
    with pytest.raises(ConfigError, match="earlier step's"):
        emits({"split": {"a": "x > 1"}}, {"split": {"a": "x > 2"}}, inputs=[readings])
    both = emits({"derive": {"y": "x"}}, inputs=[readings, Flow("readings/1", frozenset(("x", "z")))])
    assert both == {"out": Flow("readings/1", frozenset(("x", "y", "z")))}
    assert emits({"derive": {"y": "x"}}, inputs=[readings, Flow("readings/1")]) == {"out": Flow("readings/1")}


def test_from_a_photo_to_a_model_input() -> None:
    photo = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    node = operator(
        {"crop": {"middle": [4, 4]}}, {"resize": [2, 2]}, {"colour": "grey"}, {"scale": "1/255"}, {"layout": "CHW"}
    )
    out = only(node, frame(photo, attributes={"label": "7"}))
    body = out.body
    assert isinstance(body, Frame)
    assert isinstance(body.data, np.ndarray)
    assert (body.layout, body.data.shape, body.data.dtype) == ("CHW", (1, 2, 2), np.dtype(np.float32))
    assert body.attributes == {"label": "7"}
    assert out.id == "camera:a:0"


def test_the_books_of_a_mixed_stream() -> None:
    node = operator({"fill": {"x": 0}}, {"filter": "x < 50"}, "dedupe", {"derive": {"z": "x / y"}}, {"select": ["z"]})
    messages = [
        reading(0, {"x": [1.0, None, 60.0], "y": [1.0, 2.0, 3.0]}),
        reading(1, {"x": [1.0], "y": [1.0]}),
        reading(2, {"x": [2.0, 99.0]}),
        reading(3, {"x": ["far"], "y": [1.0]}),
        frame(np.zeros((2, 2)), "HW", number=4),
        reading(5, {}),
        reading(6, {"x": [3.0], "y": [0.0]}),
    ]
    sent, emit = books(node, [m for m in messages if not isinstance(m.body, Frame)])
    assert [(m.id, table(m)) for _, m in sent] == [("ingest:a:0", {"z": [1, 0]}), ("ingest:a:6", {"z": [float("inf")]})]
    assert emit.filtered == 3
    assert sorted((m.id, m.rows, why) for m, why, _ in emit.dead) == [
        ("ingest:a:2", 1, "missing-field"),
        ("ingest:a:3", 1, "wrong-type"),
        ("ingest:a:5", 0, "missing-field"),
    ]


def test_the_latest_birth_and_trace_are_kept() -> None:
    origin = reading(0, {"x": [1.0, 2.0]}, time=[0, 1])
    born = Message(origin.id, origin.source, origin.time, origin.body, "00-ab-cd-01", 42)
    for steps in (({"derive": {"y": "x"}},), ({"resample": "1s"},), ({"window": 2},)):
        sent, _ = books(operator(*steps), [born])
        assert (sent[0][1].born, sent[0][1].trace) == (42, "00-ab-cd-01")


def test_every_step_keeps_the_contract_of_a_kind() -> None:
    page = (DOCS / "steps.md").read_text("utf-8")
    assert len(preprocess.variants()) == len(kinds.names("step")) >= 24
    for name, config in preprocess.variants().items():
        module = kinds.module("step", name)
        assert (module.__doc__ or "").strip()
        assert issubclass(config, Options)
        assert callable(module.build)
        assert f"`{name}`" in page, f"docs/steps.md does not have {name}"
        for field, info in config.model_fields.items():
            assert info.description, f"{name}.{field} is not described"


def test_the_examples_of_the_page_are_right() -> None:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe")
    found = re.findall(r"`(\{[a-z-]+: .+?\})`", (DOCS / "steps.md").read_text("utf-8"))
    steps = [yaml.load(text) for text in found]
    assert len(steps) > 24
    for step in steps:
        if step != {"crop": ["x", "y", "w", "h"]} and step != {"crop": {"middle": ["w", "h"]}}:
            operator(step)


def test_json_schema() -> None:
    schema = json.dumps(Config.model_json_schema())
    for name in kinds.names("step"):
        assert f'"{name}"' in schema


def test_options_survive_a_dump() -> None:
    config = Config.model_validate({"steps": ["decode", {"resize": [4, 4]}, {"scale": "1/255"}]})
    again = Config.model_validate(config.model_dump())
    assert [e.options for e in again.steps] == [e.options for e in config.steps]
