"""``penstock model split`` and ``plan``: a model in two parts, and where to cut it."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nodes.cli._table import table
from schemas.errors import ConfigError, did_you_mean
from schemas.units import duration

if TYPE_CHECKING:
    from nodes.models.cuts import Cut
    from nodes.models.planning import Choice, Profile

SAME = 1e-4
"""Difference, in parts of the outputs' largest number, beyond which two halves are not their whole."""
_BITS = {"bit": 1.0, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9}
_LINK = re.compile(r"(\d+(?:\.\d+)?)\s*(bit|kbit|Mbit|Gbit)/s")


class Aim(NamedTuple):
    """What the plan is for; as on the command line."""

    link: str
    delay: str
    least: str
    watts: float
    joules: float


def split(path: Path, at: str | None, out: Path | None, *, as_json: bool) -> int:
    """List the cuts, or make one and see that the halves answer as their whole."""
    from nodes.models.cuts import chosen
    from nodes.models.halves import compare
    from nodes.models.planning import module_of

    module = module_of(_there(path))
    cuts: list[Cut] = module.cuts(path)
    if at is None:
        if as_json:
            print(json.dumps([_cut(cut) for cut in cuts], ensure_ascii=False))
        else:
            print("\n".join(_list(path, cuts)))
        return 0
    cut = chosen(cuts, at, path)
    folder = path.parent if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    head, tail = (folder / f"{path.stem}-{part}{path.suffix}" for part in ("head", "tail"))
    module.split(path, cut, head, tail)
    seen = compare(path, head, tail)
    if not seen.difference <= SAME:
        head.unlink()
        tail.unlink()
        raise ConfigError(f"the halves answer otherwise than {path.name}, by {seen.difference:.2g}: cut it elsewhere")
    if as_json:
        told = {"head": str(head), "tail": str(tail), **_cut(cut), "difference": seen.difference}
        print(
            json.dumps(
                {**told, "seconds": {"whole": seen.whole, "head": seen.head, "tail": seen.tail}}, ensure_ascii=False
            )
        )
        return 0
    same = "bit for bit" if seen.difference == 0 else f"but for {seen.difference:.1g} of the largest number"
    print(f"{head}: {head.stat().st_size:,} bytes, {_time(seen.head)} an item")
    print(f"{tail}: {tail.stat().st_size:,} bytes, {_time(seen.tail)} an item")
    print(f"together they answer as the whole ({_time(seen.whole)}), {same}; between them {_what(cut)}")
    return 0


def plan(path: Path, aim: Aim, there: Path | None, faster: float, out: Path | None, *, as_json: bool) -> int:
    """Measure the parts here, and say where to cut."""
    from nodes.models.planning import AIMS, Link, best, choices, profile

    if aim.least not in AIMS:
        raise ConfigError(f"--least: expected {', '.join(AIMS)}, got {aim.least!r}{did_you_mean(aim.least, AIMS)}")
    if (matched := _LINK.fullmatch(aim.link.strip())) is None:
        raise ConfigError(f"--link: expected e.g. 10Mbit/s (bit, kbit, Mbit or Gbit), got {aim.link!r}")
    rate = float(matched[1]) * _BITS[matched[2]] / 8
    if not rate:
        raise ConfigError("--link: nothing goes over a link of 0")
    try:
        link = Link(rate, duration(aim.delay) / 1e9)
    except ValueError as error:
        raise ConfigError(f"--delay: {error}") from None
    digest = hashlib.sha256(_there(path).read_bytes()).hexdigest()
    here = profile(path, digest, _progress)
    if out is not None:
        _write(out, here)
    far = _scaled(here, faster) if there is None else _read(there)
    ways = choices(here, far, link, aim.watts, aim.joules)
    chosen = best(ways, aim.least)
    if as_json:
        print(json.dumps({"best": chosen.name, "ways": [_way(way) for way in ways]}, ensure_ascii=False))
        return 0
    print(
        "\n".join(
            table(
                [["", "cut", "bytes", "here", "link", "there", "latency", "energy"], *(_row(w, chosen) for w in ways)]
            )
        )
    )
    print(f"least {aim.least}: {chosen.name}")
    return 0


def _there(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    return path


def _progress(done: int, whole: int) -> None:
    if sys.stderr.isatty():
        print(f"\rmeasured {done} of {whole} cuts", end="" if done < whole else "\n", file=sys.stderr, flush=True)


def _write(out: Path, here: Profile) -> None:
    import msgspec

    out.write_bytes(msgspec.json.encode(here))


def _read(path: Path) -> Profile:
    import msgspec

    from nodes.models.planning import Profile

    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        raise ConfigError(f"--there: {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--there: {path} is no profile: {error}") from None


def _scaled(here: Profile, faster: float) -> Profile:
    """The far machine, if it is so many times as fast as this one."""
    import msgspec

    cuts = [msgspec.structs.replace(cut, head=cut.head / faster, tail=cut.tail / faster) for cut in here.cuts]
    return msgspec.structs.replace(here, whole=here.whole / faster, cuts=cuts)


def _cut(cut: Cut) -> dict[str, Any]:
    return {
        "cut": cut.number,
        "tensor": cut.tensor,
        "shape": list(cut.shape),
        "type": cut.type,
        "bytes": cut.bytes,
        "operators": {"head": cut.head, "tail": cut.tail},
    }


def _what(cut: Cut) -> str:
    size = "a size that is known when it runs" if cut.bytes is None else f"{cut.bytes:,} bytes an item"
    return f"{cut.type}{list(cut.shape)}, {size}"


def _list(path: Path, cuts: list[Cut]) -> Iterator[str]:
    if not cuts:
        yield f"{path.name} cannot be cut: nowhere does a single tensor go from one part to the other"
        return
    rows = [["cut", "tensor", "type", "bytes an item", "operators before", "behind"]]
    for cut in cuts:
        size = "?" if cut.bytes is None else f"{cut.bytes:,}"
        rows.append(
            [str(cut.number), _short(cut.tensor), f"{cut.type}{list(cut.shape)}", size, str(cut.head), str(cut.tail)]
        )
    yield from table(rows)


def _short(name: str, most: int = 48) -> str:
    return name if len(name) <= most else f"…{name[-most + 1 :]}"


def _way(way: Choice) -> dict[str, Any]:
    return {
        "cut": way.name,
        "bytes": way.bytes,
        "here": way.here,
        "link": way.travel,
        "there": way.there,
        "latency": way.latency,
        "energy": way.energy,
    }


def _row(way: Choice, chosen: Choice) -> list[str]:
    times = (way.here, way.travel, way.there, way.latency)
    mark = "→" if way is chosen else ""
    return [mark, _short(way.name), f"{way.bytes:,}", *map(_time, times), f"{way.energy * 1e3:,.3g} mJ"]


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} µs" if seconds < 0.001 else f"{seconds * 1e3:,.2f} ms"
