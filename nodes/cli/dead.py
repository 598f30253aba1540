"""``penstock dead``: the letters that nodes refused: what there is, what is in one, and sending them again."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from schemas.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from nodes.cli._reach import Place
    from nodes.dead import DeadLetters, Letter

_SHOWN = 20
"""Letters that ``list`` tells one by one."""
_DUMPED = 4096
"""Bytes that ``show`` dumps."""


class Action(StrEnum):
    """What to do."""

    LIST = "list"
    SHOW = "show"
    REPLAY = "replay"


def command(
    action: Annotated[
        Action,
        typer.Argument(help="list: what there is; show: what is in some; replay: send them to their nodes again."),
    ],
    topology: Annotated[Path, typer.Argument(help="The topology's YAML file.", show_default=False)],
    ids: Annotated[
        list[str] | None, typer.Argument(help="Letters, as list names them: node/number.", show_default=False)
    ] = None,
    node: Annotated[list[str] | None, typer.Option(help="Only this node's; may be given more than once.")] = None,
    reason: Annotated[list[str] | None, typer.Option(help="Only for this reason; may be given more than once.")] = None,
    since: Annotated[
        str | None,
        typer.Option(help="Only those refused since then: a time ago (2h), or a date and time (ISO 8601, UTC)."),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="replay: keep the letters that the node is done with, too.")
    ] = False,
    within: Annotated[str, typer.Option(help="replay: wait for the node's answer at most so long.")] = "15s",
    every: Annotated[bool, typer.Option("--all", help="list: tell every letter.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="show: the original bytes of one letter, and nothing else.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    state: Annotated[
        Path | None, typer.Option(help="Folder of the run's state; default: .penstock/<topology> beside the file.")
    ] = None,
) -> int:
    """Dead letters: messages that a node refused, with the reason and the original bytes, kept on the machine that the node
    runs on. Replay gives them to that node alone, which must be running; those that it is done with are removed.
    """
    from nodes.cli._reach import place
    from nodes.dead import files

    found = place(topology, state)
    kept = files(found.state)
    chosen = _choose(kept, found, ids or [], node or [], reason or [], _moment(since))
    match action:
        case Action.LIST:
            return _list(kept, chosen, every=every, as_json=as_json)
        case Action.SHOW:
            if not ids:
                raise ConfigError("show: say which, e.g. parse/3; 'penstock dead list' names them")
            return _show(kept, chosen, raw=raw, as_json=as_json)
        case Action.REPLAY:
            from nodes.cli._replay import replay
            from schemas.units import duration

            try:
                patience = duration(within) / 1e9
            except ValueError as error:
                raise ConfigError(f"--within: {error}") from None
            return asyncio.run(replay(found, kept, chosen, keep=keep, patience=patience, as_json=as_json))


def _choose(
    kept: dict[str, DeadLetters],
    found: Place,
    ids: Sequence[str],
    nodes: Sequence[str],
    reasons: Sequence[str],
    since: int,
) -> dict[str, list[Letter]]:
    """Letters by node, without their payloads."""
    for name in nodes:
        if name not in kept and name not in found.topology.members:
            raise ConfigError(f"--node: there is no node {name!r}{did_you_mean(name, found.topology.members)}")
    every = {name: file.letters() for name, file in kept.items()}
    known = {f"{name}/{letter.id}" for name, letters in every.items() for letter in letters}
    for ident in ids:
        if ident not in known:
            raise ConfigError(f"there is no letter {ident!r}; 'penstock dead list' names them")
    known_reasons = {letter.reason for letters in every.values() for letter in letters}
    for text in reasons:
        if known_reasons and text not in known_reasons:
            raise ConfigError(f"--reason: none was refused for {text!r}{did_you_mean(text, known_reasons)}")
    chosen = {
        name: [
            letter
            for letter in letters
            if (not ids or f"{name}/{letter.id}" in ids)
            and (not reasons or letter.reason in reasons)
            and letter.last >= since
        ]
        for name, letters in every.items()
        if not nodes or name in nodes
    }
    return {name: letters for name, letters in chosen.items() if letters}


def _moment(text: str | None) -> int:
    """ns since the epoch of ``2h`` (ago) or ``2026-05-01T06:00``; 0 of nothing."""
    from schemas.units import duration

    if text is None:
        return 0
    try:
        return time.time_ns() - duration(text)
    except ValueError:
        try:
            at = datetime.fromisoformat(text)
        except ValueError:
            raise ConfigError(f"--since: expected a time ago, e.g. 2h, or 2026-05-01T06:00, got {text!r}") from None
        return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1e9)


# -- list -----------------------------------------------------------------------------------------------------------------


def _list(kept: dict[str, DeadLetters], chosen: dict[str, list[Letter]], *, every: bool, as_json: bool) -> int:
    dropped = {name: n for name, file in kept.items() if (n := file.dropped)}
    if as_json:
        letters = [_plain(name, letter) for name, some in chosen.items() for letter in some]
        print(json.dumps({"letters": letters, "dropped": dropped}, ensure_ascii=False))
        return 0
    for line in _overview(chosen):
        print(line)
    flat = [(name, letter) for name, letters in chosen.items() for letter in letters]
    for name, letter in flat if every else flat[-_SHOWN:]:
        print(_line(name, letter))
    if not every and len(flat) > _SHOWN:
        print(f"… and {len(flat) - _SHOWN} before these (--all)")
    for name, count in dropped.items():
        print(f"{name}: {count} older letters made room for newer ones")
    if not flat:
        print("no dead letters")
    return 0


def _overview(chosen: dict[str, list[Letter]]) -> Iterator[str]:
    """A line for each node and reason."""
    from nodes.cli._books import table

    groups: dict[tuple[str, str], list[Letter]] = {}
    for name, letters in chosen.items():
        for letter in letters:
            groups.setdefault((name, letter.reason), []).append(letter)
    if not groups:
        return
    lines = [("node", "reason", "letters", "times", "rows", "oldest", "newest")]
    for (name, reason), letters in groups.items():
        lines.append(
            (
                name,
                reason,
                str(len(letters)),
                str(sum(letter.times for letter in letters)),
                str(sum(letter.rows for letter in letters)),
                age(min(letter.first for letter in letters)),
                age(max(letter.last for letter in letters)),
            )
        )
    yield from table(lines)
    yield ""


def _line(name: str, letter: Letter) -> str:
    from nodes.cli._show import clean

    came = f" from {letter.edge}" if letter.edge else ""
    times = f" ×{letter.times}" if letter.times > 1 else ""
    mark = " (sent again, no answer)" if letter.sent is not None else " (replayed)" if letter.taken is not None else ""
    text = f"{name}/{letter.id}  {age(letter.last)}  {letter.reason}{times}{came}  {letter.position}{mark}  {letter.detail}"
    return clean(text[:400])


def age(since: int) -> str:
    """How long ago a time in ns was, for people: ``3 s``, ``5 min``, ``2 d``."""
    seconds = max(0, time.time_ns() - since) / 1e9
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _plain(name: str, letter: Letter) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.structs.asdict(letter)
    del plain["payload"]
    return {**plain, "id": f"{name}/{letter.id}", "node": name}


# -- show -----------------------------------------------------------------------------------------------------------------


def _show(kept: dict[str, DeadLetters], chosen: dict[str, list[Letter]], *, raw: bool, as_json: bool) -> int:
    whole = [(name, one) for name, some in chosen.items() for one in kept[name].letters([letter.id for letter in some])]
    if raw:
        if len(whole) != 1:
            raise ConfigError("--raw: say one letter")
        sys.stdout.buffer.write(whole[0][1].payload)
        return 0
    if as_json:
        from nodes.cli._show import data

        for name, letter in whole:
            shown = data(letter.position, letter.payload)
            print(json.dumps({**_plain(name, letter), "payload": shown}, ensure_ascii=False, allow_nan=False))
        return 0
    for name, letter in whole:
        print("\n".join(_pages(name, letter)))
    return 0


def _pages(name: str, letter: Letter) -> Iterator[str]:
    from nodes.cli._show import clean, data, moment
    from schemas import codec
    from schemas.errors import PayloadError

    yield f"{name}/{letter.id}"
    yield clean(f"  reason    {letter.reason}: {letter.detail}")
    yield f"  refused   {moment(letter.last)}" + (
        f", {letter.times} times since {moment(letter.first)}" if letter.times > 1 else ""
    )
    yield clean(f"  came by   {letter.edge or 'no edge: from outside, or made here'}")
    yield clean(f"  position  {letter.position}")
    part = f" (the first {len(letter.payload)} are kept)" if len(letter.payload) < letter.length else ""
    yield f"  bytes     {letter.length}{part}"
    try:
        codec.decode(letter.payload)
    except PayloadError:
        yield from _dump(letter.payload)
    else:
        shown = data(letter.position, letter.payload)
        for key in ("topic", "retained", "bytes"):
            shown.pop(key, None)
        yield from (clean(line) for line in json.dumps(shown, ensure_ascii=False, indent=2).splitlines())
    yield ""


def _dump(payload: bytes) -> Iterator[str]:
    """Hex and text, sixteen bytes a line."""
    for at in range(0, min(len(payload), _DUMPED), 16):
        line = payload[at : at + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in line)
        yield f"  {at:06x}  {line.hex(' '):<47}  {text}"
    if len(payload) > _DUMPED:
        yield f"  … {len(payload) - _DUMPED} more bytes (--raw)"
