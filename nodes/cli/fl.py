"""``penstock fl``: federated jobs: where they are, their rounds and clients, their curves, how one would go; an older model."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import ConfigError

if TYPE_CHECKING:
    from nodes.cli._jobs import Job
    from nodes.federate import Config

_COLUMNS = ("round", "status", "accuracy", "loss", "clients", "samples", "seconds", "bytes_up", "bytes_down", "why")

_PHASES = {
    "keys": "agreeing on keys",
    "shares": "sharing secrets",
    "masked": "collecting masked updates",
    "agreeing": "agreeing on who is in the sum",
    "unmasking": "taking the masks off the sum",
}
"""Phases of a round with a secure sum, in words."""


class Action(StrEnum):
    """What to do."""

    STATUS = "status"
    ROUNDS = "rounds"
    CLIENTS = "clients"
    COMPARE = "compare"
    SIMULATE = "simulate"
    ROLLBACK = "rollback"
    KEY = "key"
    RIGHTS = "rights"


def command(
    action: Annotated[
        Action,
        typer.Argument(
            help="status: how far the jobs are; rounds: what each round gave; clients: who is there; compare: curves of several"
            " runs as a picture; simulate: how the job would go with many clients; rollback: an older model is the model"
            " again; key: make a node's key; rights: what each party may publish and hear at the broker."
        ),
    ],
    topologies: Annotated[
        list[Path],
        typer.Argument(
            help="A topology's YAML file; for compare several, or stores (lead/JOB.sqlite); for key the key's file."
        ),
    ],
    job: Annotated[str | None, typer.Option(help="Only this job.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    state: Annotated[
        Path | None, typer.Option(help="Folder of the run's state; default: .penstock/<topology> beside the file.")
    ] = None,
    metric: Annotated[str, typer.Option(help="compare: the column that is drawn.")] = "accuracy",
    out: Annotated[Path, typer.Option(help="compare: the picture.")] = Path("rounds.svg"),
    data: Annotated[
        Path | None, typer.Option(help="simulate: an .npz file with what all clients have together (images, labels).")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="simulate: how many.")] = 100,
    alpha: Annotated[
        float | None, typer.Option(min=1e-3, help="simulate: how alike they are, by Dirichlet: 0.1 hardly, 100 very.")
    ] = None,
    spread: Annotated[float, typer.Option(min=1, help="simulate: how many times slower the slowest is.")] = 1.0,
    dropout: Annotated[
        float, typer.Option(min=0, max=1, help="simulate: part of the trainings in which one dies.")
    ] = 0,
    public: Annotated[bool, typer.Option("--public", help="key: only print the public key of a file.")] = False,
    mosquitto: Annotated[bool, typer.Option("--mosquitto", help="rights: as an acl_file of mosquitto.")] = False,
    reader: Annotated[
        list[str] | None, typer.Option(help="rights: a user who may look (fl status); may be repeated.")
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(help="status, clients: public key of who leads, or its file; the topology's if left out."),
    ] = None,
    to: Annotated[
        int | None, typer.Option(min=0, help="rollback: the version to go back to; the one before if left out.")
    ] = None,
) -> int:
    """Federated jobs of a topology: what the bus says while they run, and what they left on this machine."""
    if action is Action.COMPARE:
        return _compare(topologies, job, state, metric, out)
    if len(topologies) != 1:
        raise ConfigError(f"{action} takes one {'file' if action is Action.KEY else 'topology'}")
    from nodes.cli import _fl_keys, _jobs

    if action is Action.KEY:
        return _fl_keys.key(topologies[0], public=public, as_json=as_json)
    if action is Action.RIGHTS:
        return _fl_keys.rights(topologies[0], job, reader or [], mosquitto=mosquitto, as_json=as_json)
    place, found = _jobs.jobs(topologies[0], state, job)
    if action is Action.ROUNDS:
        return _rounds(found, as_json=as_json)
    if action is Action.SIMULATE:
        return _simulate(found[0], data, clients, alpha, spread, dropout, as_json=as_json)
    if action is Action.ROLLBACK:
        from nodes.cli._rollback import rollback

        if len(found) != 1:
            raise ConfigError(f"say with --job which: {', '.join(each.name for each in found)}")
        print(asyncio.run(rollback(place, found[0], to)))
        return 0
    for each in found:
        each.believe(coordinator)
    silent = {each.name: asyncio.run(_jobs.listen(place, each)) for each in found}
    show = _status if action is Action.STATUS else _clients
    if as_json:
        print(json.dumps([_data(each, silent[each.name]) for each in found], ensure_ascii=False))
    else:
        print("\n\n".join("\n".join(show(each, silent[each.name])) for each in found))
    return 0


def _data(job: Job, why: str) -> dict[str, Any]:
    call, last = job.call, job.rows[-1] if job.rows else None
    return {
        "job": job.name,
        "silent": why,
        "passed_over": job.passed_over,
        "phase": None if call is None else call.phase,
        "round": None if call is None else call.round,
        "run": None if call is None else call.run,
        "epoch": None if call is None else call.epoch,
        "why": None if call is None else call.why,
        "version": None if job.model is None else job.model.version,
        "metrics": {} if job.model is None else dict(job.model.metrics),
        "last": None if last is None else _plain(last),
        "part_of": None if (part := _part_of(job)) is None else {"job": part[0], "task": part[1]},
        "clients": {
            name: {"here": c.here, "samples": c.samples, "pace": c.pace, "why": c.why}
            for name, c in job.clients.items()
        },
    }


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def _part_of(job: Job) -> tuple[str, dict[str, Any] | None] | None:
    """The job above, and what this one does for it, as far as it is known here."""
    of = None if job.leads is None else getattr(job.leads.config, "of", None)
    if of is None:
        return None
    task = job.kept.get("task")
    return of.job, None if not task else {key: task[key] for key in ("round", "done", "rounds", "over")}


def _status(job: Job, why: str) -> list[str]:
    lines = [f"job {job.name}"]
    if (part := _part_of(job)) is not None:
        above, task = part
        lines.append(f"  part of the job {above}")
        if task is not None:
            skipped = f", skipped: {task['over']}" if task["over"] not in {"", "done"} else ""
            lines[-1] += (
                f": round {task['round']} there, {task['done']} of {task['rounds']} rounds done for it{skipped}"
            )
    if (call := job.call) is not None:
        asked = f", {call.asked} clients asked" if call.asked else ""
        left = f", {max(0.0, (call.deadline - time.time_ns()) / 1e9):.1f} s left" if call.deadline else ""
        said = f" ({call.why})" if call.why else ""
        lines.append(f"  {_PHASES.get(call.phase, call.phase)}{said}, round {call.round}{asked}{left}")
    else:
        lines.append(f"  nothing is heard of it{f': {why}' if why else ''}")
        if kept := job.kept.get("job"):
            over = f"over ({kept['outcome']})" if kept.get("outcome") else "not over"
            made = kept.get("version", "?") if part is None else sum(row["status"] == "committed" for row in job.rows)
            lines.append(f"  left here: {made} rounds, {over}")
    if (model := job.model) is not None:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in sorted(model.metrics.items()))
        lines.append(f"  model {model.version}, {model.size:,} bytes{f', {metrics}' if metrics else ''}")
    if job.passed_over:
        lines.append(f"  {_passed_over(job)}")
    if job.clients:
        here = sum(client.here for client in job.clients.values())
        lines.append(f"  {here} clients here, {len(job.clients) - here} away")
    if job.rows:
        last = job.rows[-1]
        lines.append(f"  last round here: {last['round']} {last['status']}, {last['seconds']:.3g} s")
    return lines


def _passed_over(job: Job) -> str:
    return f"{job.passed_over} messages passed over: not signed by those whose keys are known here"


def _clients(job: Job, why: str) -> list[str]:
    from nodes.cli._books import table

    if not job.clients:
        return [f"job {job.name}", f"  nobody is heard of{f': {why}' if why else ''}"]
    if job.passed_over:
        print(f"warning: {job.name}: {_passed_over(job)}", file=sys.stderr)
    rows = [("client", "state", "examples", "last training", "why")]
    for name, client in sorted(job.clients.items()):
        pace = f"{client.pace:.3g} s" if client.pace else ""
        rows.append((name, "here" if client.here else "away", str(client.samples or ""), pace, client.why))
    return [f"job {job.name}", *table(rows)]


def _rounds(found: list[Job], *, as_json: bool) -> int:
    from nodes.cli._books import table

    if as_json:
        for job in found:
            for row in job.rows:
                print(json.dumps({"job": job.name, **_plain(row)}, ensure_ascii=False))
        return 0
    for job in found:
        print(f"job {job.name}")
        if not job.rows:
            print("  no round is known here; its rows are where the node that leads it runs")
            continue
        columns = _COLUMNS if "above" not in job.rows[-1] else (_COLUMNS[0], "above", *_COLUMNS[1:])
        print("\n".join(table([columns, *(tuple(_cell(row.get(name)) for name in columns) for row in job.rows)])))
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else ""
    return "" if value is None else str(value)


def _compare(paths: list[Path], job: str | None, state: Path | None, metric: str, out: Path) -> int:
    from nodes.cli import _jobs
    from nodes.cli._curves import picture
    from nodes.federated.store import look

    curves: dict[str, list[tuple[float, float]]] = {}
    for path in paths:
        if path.suffix == ".sqlite":
            runs = [(str(path.parent.name) + "/" + path.stem, look(path)[0])]
        else:
            runs = [(f"{path.stem} {each.name}", each.rows) for each in _jobs.jobs(path, state, job)[1]]
        for name, rows in runs:
            curve = [(float(r["round"]), float(r[metric])) for r in rows if isinstance(r.get(metric), (int, float))]
            if not any(math.isfinite(value) for _, value in curve):
                raise ConfigError(f"{path}: no round has {metric!r}{_known(rows)}")
            curves[name if name not in curves else f"{name} ({path})"] = curve
    share = "accuracy" in metric
    out.write_text(picture(f"{metric} over rounds", curves, x="round", y=metric, share=share))
    for name, curve in curves.items():
        print(f"{name}: {len(curve)} rounds, {metric} {_cell(curve[-1][1])}")
    print(f"wrote {out}")
    return 0


def _known(rows: list[dict[str, Any]]) -> str:
    names = sorted({name for row in rows for name, v in row.items() if isinstance(v, float) and math.isfinite(v)})
    return f"; known: {', '.join(names)}" if names else ""


def _simulate(
    job: Job, data: Path | None, clients: int, alpha: float | None, spread: float, dropout: float, *, as_json: bool
) -> int:
    from nodes import federate
    from nodes.federated import fitting, kinds, simulate

    if job.leads is None or not isinstance(job.leads.config, federate.Config):
        raise ConfigError(f"no node of this topology leads the job {job.name!r}")
    config: Config = job.leads.config
    context = job.leads.context
    if data is None:
        raise ConfigError("say with --data what the clients have together: an .npz file with images and labels")
    held = config.evaluate
    scale = 1.0 if held is None else float(held.scale)
    names = fitting.HeldOut.model_validate({"path": str(data.absolute()), "scale": scale})
    rules = config.rules()
    scenario = simulate.Scenario(
        rules=rules,
        trainer=lambda: kinds.trainer(config.trainer, context),
        strategy=lambda: kinds.strategy(config.strategy),
        data=fitting.read_examples(names, context),
        held_out=None if held is None else fitting.read_examples(held, context),
        compressor=lambda: kinds.compressor(rules.compress),
        clients=clients,
        alpha=alpha,
        spread=spread,
        dropout=dropout,
    )

    def tell(row: dict[str, Any]) -> None:
        if as_json:
            print(json.dumps(_plain(row), ensure_ascii=False), flush=True)
        else:
            said = " ".join(f"{n} {_cell(row[n])}" for n in ("accuracy", "loss", "clients") if _cell(row.get(n)))
            print(f"round {row['round']} {row['status']} {said}", flush=True)

    outcome = simulate.simulate(scenario, tell)
    if not as_json:
        print(f"{outcome.reason or 'given up'} after {outcome.seconds:.1f} s of the simulation's clock")
    return 0
