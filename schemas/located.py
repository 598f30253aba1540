"""YAML 1.2 text to plain values that remember where they stood.

ruamel.yaml splits the text into events; what is built from them is ours, so that every key and value has a line and a
column, a repeated key is a fault with a place, and neither depth nor aliases can blow up: nothing here recurses without
a bound, and an alias counts as much as what it names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml import events as ev
from ruamel.yaml.error import MarkedYAMLError, YAMLError

MAX_BYTES = 262_144
"""Longest file that is looked at."""
MAX_DEPTH = 48
MAX_VALUES = 20_000
"""Most values in a file, aliases counted with all that they name."""

Key: TypeAlias = str | int
Path: TypeAlias = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL: dict[str, float] = {
    f"{sign}.{word}": float(f"{sign}inf") for sign in ("", "+", "-") for word in ("inf", "Inf", "INF")
} | {f".{word}": float("nan") for word in ("nan", "NaN", "NAN")}
_WORDS: dict[str, bool | None] = (
    dict.fromkeys(("", "~", "null", "Null", "NULL"))
    | dict.fromkeys(("true", "True", "TRUE"), True)
    | dict.fromkeys(("false", "False", "FALSE"), False)
)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_TAG = "tag:yaml.org,2002:"


class Place(NamedTuple):
    """Line and column in a file, both from 1; columns count characters."""

    line: int
    column: int


class YamlError(ValueError):
    """The text is not YAML as we take it: what is wrong and where."""

    def __init__(self, place: Place, message: str) -> None:
        super().__init__(message)
        self.place = place
        self.message = message


@dataclass(slots=True)
class Located:
    """One value and its place. A map has ``entries`` by key, a list has ``items``, all else has ``value``.

    :param start: where the value's text starts, after an opening quote; None where offsets into it have no meaning
        (block and multi-line texts, escapes).
    :param size: values in it, itself included, aliases counted in full.
    """

    place: Place
    value: str | int | float | bool | None = None
    entries: dict[Key, Located] | None = None
    items: list[Located] | None = None
    keys: dict[Key, Place] = field(default_factory=dict)
    start: Place | None = None
    size: int = 1
    depth: int = 1

    def plain(self) -> Any:
        """Fresh dicts, lists and scalars; nothing is shared, not even through aliases."""
        if self.entries is not None:
            return {key: entry.plain() for key, entry in self.entries.items()}
        if self.items is not None:
            return [item.plain() for item in self.items]
        return self.value

    def child(self, key: Key) -> Located | None:
        """The value under a key or index, or None."""
        if self.entries is not None:
            return self.entries.get(key)
        if self.items is not None and isinstance(key, int) and 0 <= key < len(self.items):
            return self.items[key]
        return None

    def find(self, path: Path, *, offset: int = 0, on_key: bool = False) -> Place:
        """Where ``path`` stands; where it is not there (a missing key, a field of a shorthand), the nearest thing.

        :param offset: characters into a text value.
        :param on_key: the key's place, not the value's.
        """
        here, key_place = self, self.place
        for key in path:
            child = here.child(key)
            if child is None:  # a missing key is the fault of the map's own key; within a shorthand it is the value's
                return key_place if here.entries is not None else here._at(offset)
            key_place = here.keys.get(key, child.place)
            here = child
        return key_place if on_key else here._at(offset)

    def _at(self, offset: int) -> Place:
        if offset and self.start is not None:
            return Place(self.start.line, self.start.column + offset)
        return self.place


def parse(data: bytes) -> tuple[Located, list[YamlError]]:
    """The one document in ``data``, and its repeated keys (the first of each is kept).

    :raises YamlError: not YAML, or more than we take of it.
    """
    if len(data) > MAX_BYTES:
        raise YamlError(Place(1, 1), f"the file has {len(data)} bytes, at most {MAX_BYTES} are read")
    text = _text(data)
    builder = _Builder(text)
    try:
        # YAML() keeps state between documents; one for each text
        for event in _events(text):
            builder.take(event)
    except MarkedYAMLError as error:
        raise _syntax(error, text) from None
    except (YAMLError, RecursionError) as error:
        raise YamlError(Place(1, 1), f"not YAML: {str(error).splitlines()[0][:200]}") from None
    if builder.root is None:
        raise YamlError(Place(1, 1), "the file is empty")
    return builder.root, builder.repeated


def _events(text: str) -> Iterator[ev.Event]:
    yield from YAML(typ="safe", pure=True).parse(text)


def _text(data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig", "replace")
        raise YamlError(_end_of(before), f"not UTF-8: byte 0x{data[error.start]:02x}") from None
    if found := _UNPRINTABLE.search(text):
        raise YamlError(_end_of(text[: found.start()]), f"a character that cannot stand here: U+{ord(found[0]):04X}")
    return text


def _end_of(text: str) -> Place:
    return Place(text.count("\n") + 1, len(text) - text.rfind("\n"))


def _syntax(error: MarkedYAMLError, text: str) -> YamlError:
    """ruamel's complaint in our words."""
    problem = str(error.problem or error.context or "not YAML")
    mark = error.problem_mark or error.context_mark
    place = Place(mark.line + 1, mark.column + 1) if mark else Place(1, 1)
    opened = error.context_mark
    since = f" that was opened at line {opened.line + 1}, column {opened.column + 1}" if opened else ""
    context = str(error.context or "")
    found = re.search(r"character '(.+?)' that cannot start", problem)
    if found and found[1] == "\\t":
        message = "a tab; indent with spaces"
    elif found:
        message = f"a plain text cannot start with {found[1]!r}; put it in quotes"
    elif "mapping values are not allowed" in problem:
        message = "a ':' where no key can be; check the indentation, or put the text in quotes"
    elif content := re.search(r"expected the node content, but found (.+)", problem):
        found_what = "the end of the file" if "stream end" in content[1] else content[1]
        message = f"expected a value, found {found_what}"
    elif "flow sequence" in context:
        message = f"expected ',' or ']' in the list{since}"
    elif "flow mapping" in context:
        message = f"expected ',' or '}}' in the map{since}"
    elif "quoted scalar" in context and "end of stream" in problem:
        message = f"the file ends inside the quoted text{since}"
    elif "expected <block end>" in problem or "block mapping" in context or "block collection" in context:
        message = f"the indentation does not fit the block{since}"
    elif "could not find expected ':'" in problem:
        message = "expected ':' after a key"
        place = Place(opened.line + 1, opened.column + 1) if opened else place
    elif "unknown escape character" in problem:
        message = f"unknown escape in double quotes; single quotes take a backslash as it is ({problem[6:]})"
    else:
        message = " ".join(f"{problem} {context}".split())[:200]
    return YamlError(place, message)


class _Builder:
    """Takes events one by one; ``root`` is there after the last."""

    def __init__(self, text: str) -> None:
        self.root: Located | None = None
        self.repeated: list[YamlError] = []
        self._text = text
        self._open: list[tuple[Located, str | None]] = []  # collection, anchor
        self._keys: list[tuple[Key, Place] | None] = []  # for each open map: the key whose value comes next
        self._merges: list[list[Located]] = []
        self._anchors: dict[str, Located] = {}
        self._values = 0

    def take(self, event: ev.Event) -> None:
        place = Place(event.start_mark.line + 1, event.start_mark.column + 1)
        match event:
            case ev.DocumentStartEvent() if self.root is not None:
                raise YamlError(place, "a second document; one file holds one topology")
            case ev.MappingStartEvent() | ev.SequenceStartEvent():
                if len(self._open) >= MAX_DEPTH:
                    raise YamlError(place, f"nested deeper than {MAX_DEPTH}")
                is_map = isinstance(event, ev.MappingStartEvent)
                self._check_tag(event, place, "map" if is_map else "seq")
                if self._wants_key():
                    raise YamlError(place, "a key must be a text or a whole number")
                node = Located(place, entries={}) if is_map else Located(place, items=[])
                self._open.append((node, event.anchor))
                self._keys.append(None)
                self._merges.append([])
            case ev.MappingEndEvent() | ev.SequenceEndEvent():
                node, anchor = self._open.pop()
                self._keys.pop()
                self._merge(node, self._merges.pop())
                self._put(node, anchor, place)
            case ev.ScalarEvent():
                node = self._scalar(event, place)
                if self._wants_key():
                    self._key(node, event)
                else:
                    self._put(node, event.anchor, place)
            case ev.AliasEvent():
                target = self._anchors.get(event.anchor)
                if target is None:
                    raise YamlError(place, f"nothing is anchored as &{event.anchor} before this")
                if self._wants_key():
                    self._key(target, None)
                else:
                    self._put(target, None, place)

    def _wants_key(self) -> bool:
        return bool(self._open) and self._open[-1][0].entries is not None and self._keys[-1] is None

    def _key(self, node: Located, event: ev.ScalarEvent | None) -> None:
        value = node.value
        if event is not None and event.value == "<<" and event.implicit[0]:
            self._keys[-1] = ("<<", Place(0, 0))  # no real key stands at line 0
            return
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise YamlError(node.place, f"a key must be a text or a whole number; quote it: '{self._source(event)}'")
        self._keys[-1] = (value, node.place)

    def _source(self, event: ev.ScalarEvent | None) -> str:
        return str(event.value) if event is not None else ""

    def _put(self, node: Located, anchor: str | None, place: Place) -> None:
        """A finished value goes to where it belongs."""
        if anchor is not None:
            self._anchors[anchor] = node
        if not self._open:
            self.root = node
            return
        parent = self._open[-1][0]
        if parent.items is not None:
            parent.items.append(node)
            self._grow(parent, node, place)
            return
        key, key_place = self._keys[-1] or ("", place)
        self._keys[-1] = None
        if key == "<<" and key_place.line == 0:
            self._merges[-1].extend(self._merged_maps(node, place))
        elif parent.entries is not None and key in parent.entries:
            first = parent.keys[key].line
            self.repeated.append(YamlError(key_place, f"the key {key!r} is here twice; first at line {first}"))
        elif parent.entries is not None:
            parent.entries[key] = node
            parent.keys[key] = key_place
            self._grow(parent, node, place)

    def _grow(self, parent: Located, node: Located, place: Place) -> None:
        parent.size += node.size
        parent.depth = max(parent.depth, node.depth + 1)
        if parent.size > MAX_VALUES:
            raise YamlError(place, f"more than {MAX_VALUES} values (aliases count as what they name)")
        if len(self._open) + node.depth > MAX_DEPTH:
            raise YamlError(place, f"nested deeper than {MAX_DEPTH}")

    def _merged_maps(self, node: Located, place: Place) -> list[Located]:
        maps = [node] if node.items is None else node.items
        if any(m.entries is None for m in maps):
            raise YamlError(place, "'<<' takes a map or a list of maps")
        return maps

    def _merge(self, node: Located, maps: list[Located]) -> None:
        """YAML's merge key: what a map says itself goes before what it takes over; the first of several wins."""
        for other in maps:
            for key, value in (other.entries or {}).items():
                if node.entries is not None and key not in node.entries:
                    node.entries[key] = value
                    node.keys[key] = other.keys[key]
                    self._grow(node, value, node.place)

    def _check_tag(self, event: ev.NodeEvent, place: Place, *fitting: str) -> None:
        tag = getattr(event, "tag", None)
        if tag is not None and str(tag) not in {"!", *(_TAG + name for name in fitting)}:
            raise YamlError(place, f"the tag {str(tag).replace(_TAG, '!!')} is not known here")

    def _scalar(self, event: ev.ScalarEvent, place: Place) -> Located:
        tag, style, text = event.tag, event.style, event.value
        self._check_tag(event, place, "str", "int", "float", "bool", "null")
        node = Located(place, text)
        begin, end = event.start_mark.index, event.end_mark.index
        source = self._text[begin:end]
        if source == text:
            node.start = place
        elif source[1:-1] == text and style in {"'", '"'}:
            node.start = Place(place.line, place.column + 1)
        if node.start is not None and "\n" in source:
            node.start = None
        if tag is None and style is None:
            node.value = _resolve(text, place)
        elif tag is not None and str(tag).startswith(_TAG) and str(tag) != f"{_TAG}str":
            node.value = _resolve(text, place)
            kinds = {"int": (int,), "float": (float, int), "bool": (bool,), "null": (type(None),)}
            wanted = str(tag).removeprefix(_TAG)
            if type(node.value) not in kinds[wanted]:
                raise YamlError(place, f"{text!r} is not of the tag !!{wanted}")
        return node


def _resolve(text: str, place: Place) -> str | int | float | bool | None:
    """A plain scalar by YAML 1.2's core schema: ``on`` and ``yes`` are texts, ``012`` is twelve."""
    if text in _WORDS:
        return _WORDS[text]
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _INT.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        number = int(text[2:] if base != 10 else text, base) if len(text) <= 40 else 2**64
        if not -(2**63) <= number < 2**64:
            raise YamlError(place, "a whole number beyond 64 bits")
        return number
    if _FLOAT.fullmatch(text):
        return float(text)
    return text
