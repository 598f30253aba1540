"""YAML as we take it: plain values, each with its place; nothing that blows up."""

from __future__ import annotations

import json
import math
import random
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.located import MAX_BYTES, MAX_DEPTH, Place, YamlError, parse


def plain(text: str) -> Any:
    return parse(text.encode())[0].plain()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("012", 12),
        ("0o17", 15),
        ("0x1F", 31),
        ("-3", -3),
        ("18446744073709551615", 2**64 - 1),
        ("1_000", "1_000"),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("1/255", "1/255"),
        ("10s", "10s"),
        ("12:30", "12:30"),
        ("2026-11-21", "2026-11-21"),
        ("'5'", "5"),
        ("!!str 5", "5"),
        ("!!float 5", 5),
        ("{a: [1, x], 2: }", {"a": [1, "x"], 2: None}),
        ("a: |\n  x\n  y\n", {"a": "x\ny\n"}),
        ("a: &x {b: 1}\nc: *x\n", {"a": {"b": 1}, "c": {"b": 1}}),
        ("a: &x {b: 1, c: 1}\nd: {<<: *x, c: 2}\n", {"a": {"b": 1, "c": 1}, "d": {"c": 2, "b": 1}}),
        (
            "a: &x {b: 1}\ne: &y {b: 2, f: 3}\nd: {<<: [*x, *y]}",
            {"a": {"b": 1}, "e": {"b": 2, "f": 3}, "d": {"b": 1, "f": 3}},
        ),
        ("'<<': 1", {"<<": 1}),
        ("\ufeffa: 1", {"a": 1}),
        ("# only\n--- \na: 1\n...\n", {"a": 1}),
    ],
)
def test_values_by_the_core_schema_of_yaml_1_2(text: str, value: Any) -> None:
    assert plain(text) == value
    assert type(plain(text)) is type(value)


def test_not_a_number() -> None:
    assert math.isnan(plain(".nan"))


DOCUMENT = b"""\
top: 1
nodes:
  a: {kind: {x: "a + b", y: [1, two]}}
  b:
    kind:
      expr: 'temp > 1'
      long: "a\\tb"
      text: |
        one
        two
"""


@pytest.mark.parametrize(
    ("path", "place", "options"),
    [
        ((), (1, 1), {}),
        (("top",), (1, 6), {}),
        (("top",), (1, 1), {"on_key": True}),
        (("nodes", "a", "kind", "x"), (3, 17), {}),
        (("nodes", "a", "kind", "x"), (3, 20), {"offset": 2}),
        (("nodes", "a", "kind", "y", 1), (3, 33), {}),
        (("nodes", "b", "kind", "expr"), (6, 13), {}),
        (("nodes", "b", "kind", "expr"), (6, 19), {"offset": 5}),
        (("nodes", "b", "kind", "long"), (7, 13), {"offset": 2}),
        (("nodes", "b", "kind", "text"), (8, 13), {"offset": 5}),
        (("nodes", "b", "kind", "missing"), (5, 5), {}),
        (("nodes", "b", "kind", "missing", "deeper", 3), (5, 5), {}),
        (("nodes", "a", "kind", "y", 7), (3, 29), {}),
        (("nodes", "b", "kind", "expr", "of a shorthand"), (6, 19), {"offset": 5}),
        (("missing",), (1, 1), {}),
    ],
)
def test_places(path: tuple[str | int, ...], place: tuple[int, int], options: dict[str, Any]) -> None:
    assert parse(DOCUMENT)[0].find(path, **options) == Place(*place)


def test_a_value_behind_an_alias_stands_where_it_was_written() -> None:
    root, _ = parse(b"a: &x {b: 1}\nc: *x\nd: {<<: *x}\n")
    assert root.find(("c", "b")) == root.find(("d", "b")) == Place(1, 11)


def test_plain_values_share_nothing() -> None:
    value = plain("a: &x {b: []}\nc: *x\n")
    value["a"]["b"].append(1)
    assert value["c"] == {"b": []}


def test_repeated_keys_are_all_told_and_the_first_is_kept() -> None:
    root, repeated = parse(b"a: 1\nb: {c: 1, c: 2}\na: 2\n'a': 3\n")
    assert root.plain() == {"a": 1, "b": {"c": 1}}
    assert [(f.place, f.message) for f in repeated] == [
        ((2, 11), "the key 'c' is here twice; first at line 2"),
        ((3, 1), "the key 'a' is here twice; first at line 1"),
        ((4, 1), "the key 'a' is here twice; first at line 1"),
    ]


SYNTAX = [
    (b"", "1:1: the file is empty"),
    (b"# nothing\n", "1:1: the file is empty"),
    (b"a: \xff", "1:4: not UTF-8: byte 0xff"),
    (b"a: 1\nb: \xc3\xa9\xc3(", "2:5: not UTF-8: byte 0xc3"),
    (b"a: \x07", "1:4: a character that cannot stand here: U+0007"),
    (b"a: 1\nb: \x00", "2:4: a character that cannot stand here: U+0000"),
    (b"a:\n\tb: 1\n", "2:1: a tab; indent with spaces"),
    (b"a: @x", "1:4: a plain text cannot start with '@'; put it in quotes"),
    (b"a: %x", "1:4: a plain text cannot start with '%'; put it in quotes"),
    (b"a: b: c", "1:5: a ':' where no key can be; check the indentation, or put the text in quotes"),
    (b"a: 1\n b: 2", "2:3: a ':' where no key can be; check the indentation, or put the text in quotes"),
    (b"a: [1\n", "2:1: expected ',' or ']' in the list that was opened at line 1, column 4"),
    (b"a: [1,\n", "2:1: expected a value, found the end of the file"),
    (b"a: }", "1:4: expected a value, found '}'"),
    (b"a: {b: 1", "1:9: expected ',' or '}' in the map that was opened at line 1, column 4"),
    (b"a: 'x\n", "2:1: the file ends inside the quoted text that was opened at line 1, column 4"),
    (b"a:\n  b: 1\n c: 2\n", "3:2: the indentation does not fit the block that was opened at line 1, column 1"),
    (b"a:\n  - 1\n  b: 2\n", "3:3: the indentation does not fit the block that was opened at line 2, column 3"),
    (b"a: 1\nb\nc: 2\n", "2:1: expected ':' after a key"),
    (
        b'a: "\\q"',
        "1:6: unknown escape in double quotes; single quotes take a backslash as it is (unknown escape character 'q')",
    ),
    (b"a: 1\n---\nb: 2\n", "2:1: a second document; one file holds one topology"),
    (b"a: *x", "1:4: nothing is anchored as &x before this"),
    (b"a: &x [*x]", "1:8: nothing is anchored as &x before this"),
    (b"a: !thing 1", "1:4: the tag !thing is not known here"),
    (b"a: !!python/object:os.system 1", "1:4: the tag !!python/object:os.system is not known here"),
    (b"a: !!int x", "1:4: 'x' is not of the tag !!int"),
    (b"? [a]\n: 1", "1:3: a key must be a text or a whole number"),
    (b"true: 1", "1:1: a key must be a text or a whole number; quote it: 'true'"),
    (b"1.5: 1", "1:1: a key must be a text or a whole number; quote it: '1.5'"),
    (b"a: &x 1\nb: {<<: *x}", "2:9: '<<' takes a map or a list of maps"),
    (b"a: 18446744073709551616", "1:4: a whole number beyond 64 bits"),
    (b"a: -9223372036854775809", "1:4: a whole number beyond 64 bits"),
    (b"a: " + b"9" * 5000, "1:4: a whole number beyond 64 bits"),
    (b"[" * (MAX_DEPTH + 1), f"1:{MAX_DEPTH + 1}: nested deeper than {MAX_DEPTH}"),
    (b"[" * 100_000, f"1:{MAX_DEPTH + 1}: nested deeper than {MAX_DEPTH}"),
    (b"a: " + b"x" * MAX_BYTES, f"1:1: the file has {MAX_BYTES + 3} bytes, at most {MAX_BYTES} are read"),
]


@pytest.mark.parametrize(("data", "expected"), SYNTAX, ids=[expected for _, expected in SYNTAX])
def test_what_is_no_yaml_is_told_with_its_place(data: bytes, expected: str) -> None:
    with pytest.raises(YamlError) as caught:
        parse(data)
    assert f"{caught.value.place.line}:{caught.value.place.column}: {caught.value.message}" == expected


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else '1'] * 9)}]" for i in range(40)),
        "\n".join(
            f"a{i}: &a{i} {{{', '.join(f'k{j}: ' + (f'*a{i - 1}' if i else '1') for j in range(9))}}}" for i in range(9)
        ),
        "a0: &a0 {x: 1}\n" + "\n".join(f"a{i}: &a{i} {{<<: *a{i - 1}, k{i}: *a{i - 1}}}" for i in range(1, 40)),
        "\n".join(f"a{i}: &a{i} [{f'*a{i - 1}' if i else '1'}]" for i in range(MAX_DEPTH)),
    ],
    ids=["lists", "maps", "merges", "depth"],
)
def test_alias_bombs_are_bounded(text: str) -> None:
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(YamlError, match=r"more than 20000 values|nested deeper"):
            parse(text.encode())
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 10


words = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn", "Zl", "Zp")), max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(values, st.booleans())
def test_json_is_yaml_too(value: Any, indented: bool) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=1 if indented else None)
    assert plain(text) == value


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.text(alphabet="ab1:-{}[],&*<!|>'\"#? \n\t%@\\", max_size=40))
def test_only_our_own_error_escapes(text: str) -> None:
    try:
        root, _ = parse(text.encode())
    except YamlError:
        return
    root.plain()


def test_mutated_documents_are_read_or_refused() -> None:
    draw = random.Random(7)
    refused = 0
    for _ in range(300):
        data = bytearray(DOCUMENT)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(data))
            data[at : at + draw.randint(0, 3)] = bytes(
                draw.choice(b"{}[]:\n\t&*'\"\xff-x ") for _ in range(draw.randint(0, 2))
            )
        try:
            parse(bytes(data))
        except YamlError as error:
            refused += 1 <= error.place.line <= data.count(b"\n") + 2
    assert 50 < refused < 300
