"""``penstock model show``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from nodes import kinds
from schemas.errors import ConfigError, Problem


def run(models: list[Path], *, as_json: bool) -> int:
    """What the files say of themselves, without a runtime."""

    told: list[dict[str, Any]] = []
    for path in models:
        name = next((n for n in kinds.names("backend") if path.suffix in kinds.module("backend", n).SUFFIXES), None)
        if name is None:
            raise ConfigError(f"{path}: no backend takes a model with this ending")
        if not path.is_file():
            raise ConfigError(f"there is no file {path}")
        try:
            signature = kinds.module("backend", name).inspect(path)
        except ConfigError as error:
            raise ConfigError(*(Problem(p.path, f"{path}: {p.message}") for p in error.problems)) from None
        told.append(
            {
                "model": str(path),
                "backend": name,
                "bytes": path.stat().st_size,
                "digest": hashlib.sha256(path.read_bytes()).hexdigest(),
                "batch": None if signature is None else signature.batch,
                "inputs": None if signature is None else [str(spec) for spec in signature.inputs],
                "outputs": None if signature is None else [str(spec) for spec in signature.outputs],
            }
        )
    if as_json:
        print(json.dumps(told, ensure_ascii=False))
        return 0
    for each in told:
        print(f"{each['model']}: {each['backend']}, {each['bytes']:,} bytes, sha256 {each['digest']}")
        if each["inputs"] is None:
            print("  what it takes and gives is known when it runs")
            continue
        print(f"  batch    {'any' if each['batch'] is None else each['batch']}")
        for name in ("inputs", "outputs"):
            print(f"  {name:<8} {', '.join(each[name])}")
    return 0
