"""``penstock model compress``: a smaller model, measured beside the one that it was made of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nodes.cli import _evaluate
from nodes.cli._evaluate import Candidate
from nodes.cli._table import table
from schemas.errors import ConfigError, RunError, did_you_mean
from schemas.messages import Array

if TYPE_CHECKING:
    from nodes.models.labelled import Known

CALIBRATE = 200
"""Examples that ranges are taken from."""


def run(
    model: Path,
    data: Path,
    x: str,
    y: str,
    labels: Path | None,
    infer: str,
    steps: str,
    way: str,
    limit: float,
    out: Path | None,
    *,
    as_json: bool,
) -> int:
    """Compress, evaluate both, keep the small one if it lost no more than ``limit`` (points of accuracy)."""
    from nodes.models import golden
    from nodes.models.evaluation import evaluate, opened
    from nodes.models.labelled import examples

    module = _module(model, way)
    target = model.with_name(f"{model.stem}-{way}{model.suffix}") if out is None else out
    if target.resolve() == model.resolve():
        raise ConfigError(f"--out: {target} is the model itself")
    before = _evaluate.candidate(model, infer, steps, labels)
    with opened([*before.before, before.model]):
        known = list(islice(examples(data, x, y, before.labels), CALIBRATE * 50))
        inputs = _inputs(before, known[:: max(1, len(known) // CALIBRATE)][:CALIBRATE])
        old = evaluate(known, before.before, before.model)
    part = target.with_suffix(f".part{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        module.compress(model, way, inputs, part)
        after = _evaluate.candidate(part, infer, steps, labels)
        with opened([*after.before, after.model]):
            new = evaluate(known, after.before, after.model)
            vector = _inputs(after, known[: golden.ITEMS])
            answers = [after.model.answers(one, 1) for one in vector]
        lost = (old.accuracy - new.accuracy) * 100
        kept = lost <= limit
        told = _told(before, old, model), _told(after, new, part)
        if kept:
            golden.write(golden.beside(target), _joined(vector), _joined(answers))
            part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    if as_json:
        print(
            json.dumps(
                {"kept": kept, "lost": lost, "limit": limit, "file": str(target), "before": told[0], "after": told[1]}
            )
        )
    else:
        print("\n".join(_text(*told)))
    if not kept:
        raise RunError(f"it lost {lost:.2f} points, more than {limit:g}: nothing was kept (--limit)")
    if not as_json:
        print(f"{target}: lost {max(lost, 0):.2f} points; its golden vector is {golden.beside(target).name}")
    return 0


def _module(model: Path, way: str) -> ModuleType:
    """What compresses such a file in that way.

    :raises ConfigError: nothing does.
    """
    from nodes.models import compress_onnx, compress_tflite

    if not model.is_file():
        raise ConfigError(f"there is no file {model}")
    for module in (compress_tflite, compress_onnx):
        if model.suffix == module.SUFFIX:
            if way not in module.WAYS:
                known = ", ".join(module.WAYS)
                raise ConfigError(
                    f"--to: {module.SUFFIX} models become {known}, not {way!r}{did_you_mean(way, module.WAYS)}"
                )
            return module
    raise ConfigError(f"{model.name}: only .tflite and .onnx models can be made small")


def _inputs(candidate: Candidate, known: list[Known]) -> list[dict[str, Array]]:
    """What the model is given for each, one item each.

    :raises ConfigError: it can take none of them.
    """
    from nodes.models.evaluation import prepared
    from nodes.operator import Emit

    emit = Emit()
    messages = prepared([one.message for one in known], candidate.before, emit)
    whole = candidate.model.inputs(messages, emit)
    n = min((len(value) for value in whole.values()), default=0)
    if not n:
        why = f": {emit.dead[0][2]}" if emit.dead else ""
        raise ConfigError(f"the model can take none of the examples{why}")
    return [{name: value[i : i + 1] for name, value in whole.items()} for i in range(n)]


def _joined(parts: list[dict[str, Array]]) -> dict[str, Array]:
    import numpy as np

    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _told(candidate: Candidate, report: Any, path: Path) -> dict[str, Any]:
    alone, rate = _evaluate.speed(candidate)
    return {
        "bytes": path.stat().st_size,
        "right": report.right,
        "examples": report.examples,
        "accuracy": report.accuracy,
        "seconds_one": alone,
        "items_per_second": rate,
    }


def _text(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    rows = [["", "bytes", "right", "accuracy", "one item", "items/s"]]
    for name, told in (("before", before), ("after", after)):
        right = f"{told['right']} of {told['examples']}"
        one = f"{told['seconds_one'] * 1e6:,.1f} µs"
        rows.append(
            [name, f"{told['bytes']:,}", right, f"{told['accuracy']:.2%}", one, f"{told['items_per_second']:,.0f}"]
        )
    smaller = before["bytes"] / after["bytes"]
    times = before["seconds_one"] / after["seconds_one"], after["items_per_second"] / before["items_per_second"]
    rows.append(["", f"{smaller:.1f}× smaller", "", "", f"{times[0]:.1f}× as fast", f"{times[1]:.1f}× as many"])
    yield from table(rows)
