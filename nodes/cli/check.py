"""``penstock check``: everything that can be known to be wrong in a topology before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import ConfigError

if TYPE_CHECKING:
    from nodes.plan import Plan


def counted(number: int, thing: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def summary(plan: Plan) -> str:
    """A topology that is right, in one line."""
    parts = [counted(len(plan.nodes), "node"), counted(len(plan.edges), "edge")]
    if len(plan.topology.hosts) > 1:
        parts.append(counted(len(plan.topology.hosts), "host"))
    if len(plan.topology.brokers) > 1:
        parts.append(counted(len(plan.topology.brokers), "broker"))
    return ", ".join(parts)


def described(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: what ``--json`` prints for a topology that is right."""
    return {
        "ok": True,
        "topology": plan.topology.name,
        "nodes": [
            {
                "name": node.name,
                "kind": node.kind,
                "host": node.host,
                "broker": node.broker,
                "process": node.process,
                "sends": {port: flow.type for port, flow in node.outputs.items()},
            }
            for node in plan.nodes.values()
        ],
        "edges": [
            {
                "from": edge.name,
                "to": edge.consumer,
                "type": edge.type,
                "delivery": edge.delivery,
                "queue": edge.queue,
                "overflow": edge.overflow,
                "carrier": edge.carrier,
                "topic": edge.topic,
                "shared": edge.shared,
            }
            for edge in plan.edges
        ],
    }


def faults(error: ConfigError) -> dict[str, Any]:
    """What is wrong as plain values."""
    lines = getattr(error, "lines", ())
    if lines:
        found = [
            {"file": line.file, "line": line.place.line, "column": line.place.column, "message": line.message}
            for line in lines
        ]
    else:
        found = [{"message": problem.message} for problem in error.problems]
    return {"ok": False, "errors": found}


def command(
    topology: Annotated[Path, typer.Argument(help="The topology's YAML file.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan, or what is wrong, as JSON.")] = False,
) -> int:
    """Find everything that can be known to be wrong before running.

    Each fault is one line on stderr, file:line:column: what is wrong; the exit code is then 2. Nothing is started.
    """
    from nodes.plan import prepare

    try:
        plan = prepare(topology)
    except ConfigError as error:
        if not as_json:
            raise
        print(json.dumps(faults(error), ensure_ascii=False, indent=2))
        return error.exit_code
    print(json.dumps(described(plan), ensure_ascii=False, indent=2) if as_json else f"ok: {summary(plan)}")
    return 0
