"""``penstock model evaluate``: which models are shown what, and how the outcome reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodes.cli._table import table
from schemas.errors import ConfigError, Problem

if TYPE_CHECKING:
    from nodes.inference import Infer
    from nodes.models.evaluation import Report
    from nodes.operator import Operator

_TOPOLOGY = {".yaml", ".yml"}
_WRONG = 5
"""Wrongly answered examples that are named."""


@dataclass
class Candidate:
    """A model with what stands before it.

    :param parts: its files.
    :param before: operators that prepare what it sees.
    """

    name: str
    parts: list[Path]
    before: list[Operator]
    model: Infer
    labels: list[str] | None


def run(
    models: list[Path], data: Path, x: str, y: str, labels: Path | None, infer: str, steps: str, *, as_json: bool
) -> int:
    """Evaluate all of them and print what came of it; the arguments are the command line's."""
    from nodes.models.evaluation import evaluate, opened
    from nodes.models.labelled import examples

    reports: list[tuple[Candidate, Report]] = []
    for candidate in _candidates(models, _yaml(infer, dict, "--infer"), _yaml(steps, list, "--steps"), labels):
        with opened([*candidate.before, candidate.model]):
            known = examples(data, x, y, candidate.labels)
            reports.append((candidate, evaluate(known, candidate.before, candidate.model)))
    if as_json:
        print(json.dumps([_data(*each) for each in reports], ensure_ascii=False))
    else:
        print("\n".join(_text(reports)))
    return 0


def candidate(path: Path, infer: str, steps: str, labels: Path | None) -> Candidate:
    """One model's file as the command line has it, not open yet.

    :raises ConfigError: it is a topology, is not there, or does not fit its options.
    """
    if path.suffix in _TOPOLOGY:
        raise ConfigError(f"{path}: expected a model's file")
    (one,) = _candidates([path], _yaml(infer, dict, "--infer"), _yaml(steps, list, "--steps"), labels)
    return one


def _yaml(text: str, form: type, option: str) -> Any:
    """:raises ConfigError: it is not YAML, or of another form."""
    from schemas.located import YamlError, parse

    try:
        located, repeated = parse(text.encode())
    except YamlError as error:
        raise ConfigError(f"{option}: {error}") from None
    if repeated:
        raise ConfigError(f"{option}: {repeated[0]}")
    plain = located.plain()
    if not isinstance(plain, form):
        raise ConfigError(f"{option}: expected a {'map' if form is dict else 'list'}, got {text}")
    return plain


# -- which models ----------------------------------------------------------------------------------------------------


def _candidates(
    models: list[Path], options: dict[str, Any], steps: list[Any], labels: Path | None
) -> Iterator[Candidate]:
    """Every model that was named, not open yet.

    :raises ConfigError: one is not there, does not fit its options, or a topology has none.
    """
    for path in models:
        if path.suffix in _TOPOLOGY:
            yield from _of_topology(path)
        else:
            yield _of_file(
                path, {**options, **({"labels": str(labels)} if labels else {})}, steps, several=len(models) > 1
            )


def _of_file(path: Path, options: dict[str, Any], steps: list[Any], *, several: bool) -> Candidate:
    from nodes import infer, kinds, preprocess
    from nodes.operator import Context
    from schemas.problems import validated

    backend = options.get("backend")
    if several and isinstance(backend, dict) and len(backend) == 1:
        name = next(iter(backend))
        if path.suffix not in kinds.module("backend", str(name)).SUFFIXES:  # it is meant for another of them
            options = {key: value for key, value in options.items() if key != "backend"}
    here = Path.cwd()
    context = Context("model", path.stem, here, here)
    try:
        config = validated(infer.Config, {**options, "model": str(path)})
        config.check(context)
    except ConfigError as error:
        raise _about(path, error) from None
    before: list[Operator] = []
    if steps:
        try:
            first = validated(preprocess.Config, {"steps": steps})
            first.check(context)
        except ConfigError as error:
            raise _about("--steps", error) from None
        before = [preprocess.build(first, context)]
    return _candidate(path.name, config, context, before)


def _of_topology(path: Path) -> Iterator[Candidate]:
    """Its infer nodes, each with the preprocess nodes straight before it."""
    from nodes import preprocess
    from nodes.infer import Config
    from nodes.plan import prepare

    plan = prepare(path)
    found = [node for node in plan.nodes.values() if isinstance(node.config, Config) and node.replica == 0]
    if not found:
        raise ConfigError(f"{path} has no infer node")
    for node in found:
        assert isinstance(node.config, Config)  # noqa: S101 - for the type checker
        before: list[Operator] = []
        at = node
        while len(at.inputs) == 1 and isinstance(
            (source := plan.nodes[at.inputs[0].producer]).config, preprocess.Config
        ):
            before.insert(0, preprocess.build(source.config, source.context))
            at = source
        yield _candidate(f"{path.name}: {node.logical}", node.config, node.context, before)


def _candidate(name: str, config: Any, context: Any, before: list[Operator]) -> Candidate:
    from nodes import infer

    backend, _ = config.chosen_backend()
    path = context.path(config.model)
    parts = list(getattr(backend, "parts", lambda file: (file,))(path))
    model = infer.build(config, context)
    return Candidate(name, parts, before, model, config.read_labels(context) or None)  # type: ignore[arg-type] # it is an Infer


def _about(what: Path | str, error: ConfigError) -> ConfigError:
    return ConfigError(*(Problem(p.path, f"{what}: {p.message}") for p in error.problems))


# -- what is told ----------------------------------------------------------------------------------------------------


def speed(candidate: Candidate) -> tuple[float, float]:
    """Seconds of one item alone, and items a second in the largest batch."""
    times = candidate.model.invoke_times
    size, seconds = max(times.items())
    return times.get(1, seconds / size), size / seconds


def _data(candidate: Candidate, report: Report) -> dict[str, Any]:
    alone, rate = speed(candidate)
    names = report.labels(candidate.labels or [])
    return {
        "model": candidate.name,
        "bytes": sum(part.stat().st_size for part in candidate.parts),
        "digest": candidate.model.model.digest,
        "examples": report.examples,
        "right": report.right,
        "accuracy": report.accuracy,
        "refused": dict(report.refused),
        "seconds_one": alone,
        "items_per_second": rate,
        "recall": {label: _plain(report.recall(label)) for label in names},
        "precision": {label: _plain(report.precision(label)) for label in names},
        "confusion": {a: {b: report.counts[a, b] for b in names if report.counts[a, b]} for a in names},
        "wrong": report.wrong,
    }


def _plain(share: float) -> float | None:
    return None if share != share else share


def _text(reports: list[tuple[Candidate, Report]]) -> Iterator[str]:
    first = reports[0][1]
    rows = [
        ["model", "bytes", "right", "accuracy", *(["as the first"] if len(reports) > 1 else []), "one item", "items/s"]
    ]
    for candidate, report in reports:
        alone, rate = speed(candidate)
        rows.append(
            [
                candidate.name,
                f"{sum(part.stat().st_size for part in candidate.parts):,}",
                f"{report.right} of {report.examples}",
                f"{report.accuracy:.2%}",
                *([f"{report.agreement(first):.2%}"] if len(reports) > 1 else []),
                f"{alone * 1e6:,.1f} µs" if alone < 0.001 else f"{alone * 1e3:,.2f} ms",
                f"{rate:,.0f}",
            ]
        )
    yield from table(rows)
    for candidate, report in reports:
        for why, n in report.refused.most_common():
            yield f"{candidate.name}: {n} refused: {why}"
    if len(reports) == 1:
        yield ""
        yield from _confusion(*reports[0])


def _confusion(candidate: Candidate, report: Report) -> Iterator[str]:
    """Known classes downwards, answered ones to the right."""
    names = report.labels(candidate.labels or [])
    rows = [["known", *names, "recall"]]
    for label in names:
        cells = [str(report.counts[label, said] or "·") for said in names]
        rows.append([label, *cells, _percent(report.recall(label))])
    rows.append(["precision", *(_percent(report.precision(label)) for label in names), ""])
    yield from table(rows)
    if report.wrong:
        more = "" if report.examples - report.right <= _WRONG else ", …"
        yield f"wrong: {', '.join(report.wrong[:_WRONG])}{more}"


def _percent(share: float) -> str:
    return "" if share != share else f"{share:.1%}"
