"""The user's own code: found, checked without running, loaded, called, and kept from hurting others."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from nodes.custom import Config, build
from nodes.operator import Context, Emit, Flow, Operator
from schemas.errors import ConfigError, MissingError
from schemas.messages import Event, Message, Readings

HEAD = """
import numpy as np
from schemas.messages import Event, Frame, Message, Readings
from nodes.operator import Operator
"""


def context(folder: Path) -> Context:
    return Context("plant", "mine", folder, folder)


def config(**options: Any) -> Config:
    return Config.model_validate(options)


def reading(number: int, *values: float) -> Message:
    body = Readings(n=len(values), columns={"t": np.array(values)})
    return Message(f"in:x:{number}", "dev", number, body, None, 77)


def make(folder: Path, code: str, **options: Any) -> Operator:
    """Check and build ``f`` of this code."""
    (folder / "my_node.py").write_text(HEAD + code)
    made = config(**{"path": "my_node.py", "function": "f", **options})
    made.check(context(folder))
    made.emits([], context(folder))
    return build(made, context(folder))


def run(op: Operator, *messages: Message) -> Emit:
    emit = Emit()
    op.process(list(messages), "in.out", emit)
    return emit


def test_a_function_of_a_message_answers_with_a_body(tmp_path: Path) -> None:
    op = make(
        tmp_path,
        "def f(message, factor=1.0) -> Readings:\n"
        "    r = message.body\n"
        "    return Readings(n=r.n, columns={'t': r.columns['t'] * factor})\n",
        options={"factor": 3},
    )
    emit = run(op, reading(1, 1.0, 2.0), reading(2, 5.0))
    assert [m.id for m in emit.messages()] == ["in:x:1", "in:x:2"]
    columns = [m.body.columns["t"] for m in emit.messages() if isinstance(m.body, Readings)]
    assert [list(c) for c in columns] == [[3.0, 6.0], [15.0]]
    assert (emit.absorbed, emit.filtered, emit.messages()[0].born) == (3, 0, 77)


def test_a_function_of_a_body_may_answer_none(tmp_path: Path) -> None:
    op = make(tmp_path, "def f(r: Readings) -> Readings | None:\n    return r if r.columns['t'][0] > 1 else None\n")
    emit = run(op, reading(1, 0.0, 0.0), reading(2, 2.0))
    assert [m.id for m in emit.messages()] == ["in:x:2"]
    assert (emit.absorbed, emit.filtered) == (1, 2)


def test_several_answers_are_numbered_and_go_to_ports(tmp_path: Path) -> None:
    op = make(
        tmp_path,
        "def f(m: Message):\n    yield m.body\n    yield ('alarm', Event(name='hot'))\n    yield m\n    yield None\n",
        emits={"out": "readings/1", "alarm": "event/1"},
    )
    emit = run(op, reading(1, 9.0))
    assert [m.id for m in emit.messages()] == ["in:x:1/0", "in:x:1/2"]
    assert [m.id for m in emit.messages("alarm")] == ["in:x:1/1"]
    assert isinstance(emit.messages("alarm")[0].body, Event)


def test_a_function_of_many_messages(tmp_path: Path) -> None:
    op = make(
        tmp_path,
        "def f(messages: list[Message]) -> list[Message]:\n"
        "    return [messages[-1].derive(Event(name=str(len(messages))))]\n",
        emits="event/1",
    )
    emit = run(op, reading(1, 1.0), reading(2, 1.0, 1.0))
    assert [(m.id, m.body.name) for m in emit.messages() if isinstance(m.body, Event)] == [("in:x:2", "2")]
    assert emit.absorbed == 3


def test_an_exception_costs_its_message_only(tmp_path: Path) -> None:
    op = make(
        tmp_path,
        "def f(r: Readings) -> Readings:\n    if r.n > 1:\n        raise ValueError('two\\nmany')\n    return r\n",
    )
    emit = run(op, reading(1, 1.0), reading(2, 1.0, 2.0), reading(3, 1.0))
    assert [m.id for m in emit.messages()] == ["in:x:1", "in:x:3"]
    [(message, reason, detail)] = emit.dead
    assert (message.id, reason, detail) == ("in:x:2", "exception", "my_node.py:7: ValueError: two many")
    assert emit.absorbed == 2


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        ("5", "f() answered with int; expected a message"),
        ("'text'", "f() answered with str"),
        ("{'t': 1}", "f() answered with dict"),
        ("np.zeros(3)", "answered with an array"),
        ("[m, 5]", "f() answered with int"),
        ("Event(name='x')", "f() answered with event/1; emits says readings/1"),
        ("('nowhere', m)", "f() answered on port 'nowhere'; emits names out"),
    ],
)
def test_a_wrong_answer_is_said(tmp_path: Path, answer: str, detail: str) -> None:
    op = make(tmp_path, f"def f(m):\n    return {answer}\n", emits="readings/1")
    emit = run(op, reading(1, 1.0))
    [(_, reason, said)] = emit.dead
    assert reason == "bad-answer"
    assert detail in said
    assert not emit.sent
    assert emit.absorbed == 0


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        ("[('e', Event(name='x'))]", "message.derive(Event(…))"),
        ("[ms[0], ms[0]]", "answered twice with the id 'in:x:1'"),
    ],
)
def test_a_wrong_answer_to_many_messages_raises(tmp_path: Path, answer: str, detail: str) -> None:
    op = make(
        tmp_path, f"def f(ms: list[Message]):\n    return {answer}\n", emits={"out": "readings/1", "e": "event/1"}
    )
    with pytest.raises(TypeError) as caught:
        run(op, reading(1, 1.0))
    assert detail in str(caught.value)


def test_a_message_of_another_type_than_the_annotation(tmp_path: Path) -> None:
    op = make(tmp_path, "def f(r: Readings) -> Readings:\n    return r\n")
    emit = run(op, Message("a", "b", 1, Event(name="x")))
    assert "takes readings/1 and was sent event/1" in emit.dead[0][2]


def test_an_operator_of_the_users(tmp_path: Path) -> None:
    op = make(
        tmp_path,
        "class f(Operator):\n"
        "    def __init__(self, least):\n        self.least = least\n        self.seen = 0\n"
        "    def process(self, messages, edge, emit):\n"
        "        for m in messages:\n"
        "            self.seen += 1\n"
        "            emit.send(m) if m.rows >= self.least else emit.filter(m.rows)\n"
        "    def snapshot(self):\n        return self.seen\n",
        emits="readings/1",
        options={"least": 2},
        blocking=True,
    )
    emit = run(op, reading(1, 1.0), reading(2, 1.0, 2.0))
    assert [m.id for m in emit.messages()] == ["in:x:2"]
    assert (op.snapshot(), op.blocking, emit.filtered) == (2, True, 1)


def problems(folder: Path, code: str | None, **options: Any) -> list[tuple[tuple[str | int, ...], str]]:
    if code is not None:
        (folder / "my_node.py").write_text(HEAD + code)
    made = config(**{"path": "my_node.py", "function": "f", **options})

    def check() -> None:
        made.check(context(folder))
        made.emits([Flow("event/1")], context(folder))

    with pytest.raises(ConfigError) as caught:
        check()
    return [(p.path, p.message) for p in caught.value.problems]


@pytest.mark.parametrize(
    ("code", "options", "path", "said"),
    [
        (None, {}, ("path",), "there is no file"),
        ("def f(m:\n", {}, ("path",), "my_node.py:5: "),
        (
            "def clean(m): ...\n",
            {"function": "claen"},
            ("function",),
            "my_node.py has no 'claen'; did you mean 'clean'?",
        ),
        ("async def f(m): ...\n", {}, ("function",), "my_node.py:5: f is async; a custom node does no I/O"),
        ("def f(): ...\n", {}, ("function",), "f() takes no message"),
        ("def f(m, limit=0): ...\n", {"options": {"limt": 1}}, ("options", "limt"), "did you mean 'limit'?"),
        ("def f(m, *, limit): ...\n", {}, ("options",), "option 'limit' is missing"),
        ("class f(Operator):\n    def __init__(self, a): ...\n", {}, ("options",), "option 'a' is missing"),
        ("def f(m): ...\n", {}, (), "say what comes out, e.g. emits: readings/1, or annotate"),
        ("class f(Operator): ...\n", {}, (), "say what comes out, e.g. emits: readings/1"),
        ("def f(m): ...\n", {"emits": "reading/1"}, ("emits",), "did you mean 'readings/1'?"),
        ("def f(m): ...\n", {"emits": {"dead": "event/1"}}, ("emits", "dead"), "a port cannot be called 'dead'"),
        ("def f(m): ...\n", {"emits": {}}, ("emits",), "expected at least one port"),
        ("def f(m): ...\n", {"takes": ["frames/1"]}, ("takes", 0), "did you mean 'frame/1'?"),
        ("def f(m: Frame) -> Frame: ...\n", {}, (), "takes frame/1 and would be sent event/1"),
    ],
)
def test_check_says_what_is_wrong(
    tmp_path: Path, code: str | None, options: dict[str, Any], path: tuple[str | int, ...], said: str
) -> None:
    found = problems(tmp_path, code, **options)
    assert len(found) == 1
    assert found[0][0] == path
    assert said in found[0][1]


def test_check_does_not_run_the_code(tmp_path: Path) -> None:
    (tmp_path / "my_node.py").write_text("raise SystemExit('ran')\ndef f(m) -> 'Readings': ...\n")
    made = config(path="my_node.py", function="f")
    made.check(context(tmp_path))
    assert made.emits([], context(tmp_path)) == {"out": Flow("readings/1")}
    with pytest.raises(ConfigError, match=r"my_node.py:1: SystemExit: ran"):
        build(made, context(tmp_path))


def test_errors_of_loading_name_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "my_node.py"
    made = config(path="my_node.py", function="f", emits="event/1")
    file.write_text("import math\nimport no_such_library_here\ndef f(m): ...\n")
    with pytest.raises(MissingError, match=r"no_such_library_here, which my_node.py:2 imports, is not installed"):
        build(made, context(tmp_path))
    file.write_text("from math import nothing_such\ndef f(m): ...\n")
    with pytest.raises(ConfigError, match=r"my_node.py:1: ImportError: cannot import name 'nothing_such'"):
        build(made, context(tmp_path))
    file.write_text("f = 5\n")
    with pytest.raises(ConfigError, match="has no function or class 'f'"):
        build(made, context(tmp_path))
    file.write_text("class f:\n    pass\n")
    with pytest.raises(ConfigError, match="does not derive"):
        build(made, context(tmp_path))
    file.write_text("import functools\nasync def g(m): ...\nf = g\n")
    with pytest.raises(ConfigError, match="is async"):
        build(made, context(tmp_path))
    file.write_text(HEAD + "class f(Operator):\n    def __init__(self, a=1):\n        raise ValueError('bad a')\n"
                    "    def process(self, messages, edge, emit): ...\n")  # fmt: skip
    with pytest.raises(ConfigError, match=r"my_node.py:7: ValueError: bad a"):
        build(made, context(tmp_path))


def test_loading_leaves_the_path_alone_and_copies_apart(tmp_path: Path) -> None:
    before = list(sys.path)
    code = "seen = []\ndef f(m) -> Event:\n    seen.append(m)\n    return Event(name=str(len(seen)))\n"
    (tmp_path / "my_node.py").write_text(HEAD + code)
    made = config(path="my_node.py", function="f")
    one, two = (build(made, Context("t", name, tmp_path, tmp_path)) for name in ("a", "b"))
    run(one, reading(1, 1.0))
    body = run(two, reading(2, 1.0)).messages()[0].body
    assert isinstance(body, Event)
    assert body.name == "1", "each node has the module for itself"
    assert sys.path == before


def test_a_dotted_name(tmp_path: Path) -> None:
    made = config(call="nodes.usercode.survey:find_module", emits="event/1")
    made.check(context(tmp_path))
    with pytest.raises(ConfigError, match=r"there is no module 'nodes\.nothing'"):
        config(call="nodes.nothing:f", emits="event/1").check(context(tmp_path))
    with pytest.raises(ConfigError, match=r"expected package\.module:name"):
        config(call="nodes.custom", emits="event/1").check(context(tmp_path))
    with pytest.raises(ConfigError, match="has no 'buidl'; did you mean 'build'"):
        config(call="nodes.custom:buidl", emits="event/1").check(context(tmp_path))
    op = build(config(call="schemas.rows:rows", emits="event/1"), context(tmp_path))
    with pytest.raises(TypeError, match="answered with Rows"):
        run(op, reading(1, 1.0))


@pytest.mark.parametrize(
    "options", [{}, {"path": "a.py"}, {"path": "a.py", "function": "f", "call": "m:f"}, {"function": "f"}]
)
def test_either_path_or_call(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(**options)


def test_the_page_works(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "custom.md").read_text()
    function, operator = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_node.py").write_text(function)
    made = config(path="my_node.py", function="clean", options={"limit": 80})
    made.check(context(tmp_path))
    op = build(made, context(tmp_path))
    body = Readings(n=2, columns={"temp": np.array([70.0, 90.0])})
    [message] = run(op, Message("a", "b", 1, body)).messages()
    assert message.rows == 1
    (tmp_path / "my_node.py").write_text(operator)
    made = config(path="my_node.py", function="Missing", options={"most": 2}, emits="event/1")
    made.check(context(tmp_path))
    op = build(made, context(tmp_path))
    emit = run(op, *(Message(str(t), "b", t * 10**9, body) for t in (1, 2, 5)))
    assert [m.id for m in emit.messages()] == ["5"]
    op.restore(op.snapshot())
