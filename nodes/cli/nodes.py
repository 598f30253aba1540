"""``penstock nodes``: what nodes can be made of, and the options of each kind."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import Annotated, Any

import typer

from nodes import kinds
from nodes.cli import _kinds
from nodes.cli._kinds import FAMILIES, Kind, Option

TITLES = {
    "node": "Nodes",
    "source": "Sources of ingest",
    "step": "Steps of preprocess",
    "backend": "Backends of infer",
    "decoder": "Decoders of infer",
    "sink": "Sinks of uplink",
    "trainer": "Trainers of train",
    "strategy": "Strategies of federate",
    "compressor": "Compressors of federate",
}


def overview() -> str:
    """All kinds with their first line, by family."""
    parts = []
    for family in FAMILIES:
        names = kinds.names(family)
        width = max(map(len, names), default=0)
        lines = [f"  {name:<{width}}  {_kinds.summary(family, name)}" for name in names]
        parts.append("\n".join([TITLES[family], *lines]))
    return "\n\n".join([*parts, "One kind and its options: penstock nodes NAME, or FAMILY/NAME, e.g. sink/mqtt"])


def default_text(option: Option) -> str:
    """A default as YAML would have it."""
    return "required" if option.required else json.dumps(option.default, ensure_ascii=False)


def one(kind: Kind) -> str:
    """One kind with its options, for a terminal."""
    lines = [f"{kind.family} {kind.name}", "", *(f"  {line}".rstrip() for line in plain(kind.text).splitlines())]
    for note in notes(kind):
        lines += ["", f"  {note}"]
    if kind.options:
        lines += ["", "Options"]
    for option in kind.options:
        lines.append(f"  {option.name}: {option.type}; {_said(option)}")
        if option.description:
            lines += textwrap.wrap(
                option.description, 100, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
            )
    return "\n".join(lines)


def _said(option: Option) -> str:
    return "required" if option.required else f"default {default_text(option)}"


def notes(kind: Kind) -> list[str]:
    """What a reader must know beside the options."""
    out = []
    if kind.within:
        out.append(f"The options of the {kind.within} that is named stand beside its own.")
    if kind.short:
        out.append("A bare value may stand for the map of options.")
    if kind.extra:
        out.append(f"Needs: pip install 'penstock[{kind.extra}]'")
    return out


def markdown() -> str:
    """The reference of all kinds: the page ``docs/kinds.md``."""
    lines = [
        "# Kinds",
        "",
        "Everything that a node can be made of, with its options. Made by `penstock nodes --markdown`; do not edit.",
        "",
    ]
    for family in FAMILIES:
        lines += [f"## {TITLES[family]}", ""]
        for name in kinds.names(family):
            lines += _section(_kinds.describe(family, name))
    return "\n".join(lines).rstrip()


def _section(kind: Kind) -> list[str]:
    lines = [f"### {kind.family} `{kind.name}`", "", plain_markdown(kind.text), ""]
    for note in notes(kind):
        lines += [note, ""]
    if kind.options:
        lines += ["| option | takes | default | meaning |", "|---|---|---|---|"]
    for option in kind.options:
        default = "required" if option.required else "" if option.default is None else f"`{default_text(option)}`"
        cells = (f"`{option.name}`", option.type, default, option.description)
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return [*lines, ""] if kind.options else lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("``", "`")


def plain(text: str) -> str:
    """A docstring as plain text."""
    return plain_markdown(text).replace("`", "")


def plain_markdown(text: str) -> str:
    """A docstring as Markdown: its double backquotes become single ones, roles become code."""
    import re

    text = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def as_data(kind: Kind) -> dict[str, Any]:
    """One kind as plain values, for ``--json``."""
    return asdict(kind)


def command(
    name: Annotated[str | None, typer.Argument(help="A kind: infer, csv, sink/mqtt.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference of all kinds.")] = False,
) -> None:
    """List the kinds of nodes and of what they are made of, from sources to strategies; or describe one with its options."""
    if as_markdown:
        print(markdown())
        return
    if name is None and not as_json:
        print(overview())
        return
    wanted = [(f, n) for f in FAMILIES for n in kinds.names(f)] if name is None else _kinds.find(name)
    found = [_kinds.describe(*kind) for kind in wanted]
    if as_json:
        print(json.dumps([as_data(kind) for kind in found], ensure_ascii=False, indent=2))
    else:
        print("\n\n".join(map(one, found)))
