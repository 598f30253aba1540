"""``penstock graph``: a topology as Mermaid text or as an SVG picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from schemas.errors import ConfigError

if TYPE_CHECKING:
    from nodes.plan import Plan, PlannedNode


def mermaid(plan: Plan) -> str:
    """The plan as a Mermaid flowchart; hosts, where there are several, are its frames."""
    from nodes.cli._svg import label

    ids = {name: f"n{i}" for i, name in enumerate(plan.nodes)}  # Mermaid has words of its own, such as "end"
    lines = ["flowchart LR"]
    hosts = list(dict.fromkeys(node.host for node in plan.nodes.values()))
    for number, host in enumerate(hosts):
        members = [_mermaid_node(node, ids[node.name]) for node in plan.nodes.values() if node.host == host]
        if len(hosts) > 1:
            lines += [f'  subgraph h{number}["{host}"]', *(f"  {member}" for member in members), "  end"]
        else:
            lines += members
    for edge in plan.edges:
        arrow = f'-. "{label(edge)}" .->' if edge.delivery == "fast" else f'-- "{label(edge)}" -->'
        lines.append(f"  {ids[edge.producer]} {arrow} {ids[edge.consumer]}")
    return "\n".join(lines) + "\n"


def _mermaid_node(node: PlannedNode, ident: str) -> str:
    from nodes.cli._svg import caption

    text = f"{node.name}<br/>{caption(node)}".replace('"', "#quot;")
    return f'  {ident}(["{text}"])' if not node.inputs else f'  {ident}["{text}"]'


def command(
    topology: Annotated[Path, typer.Argument(help="The topology's YAML file.", show_default=False)],
    form: Annotated[
        Literal["mermaid", "svg"] | None,
        typer.Option("--format", "-f", help="mermaid or svg. Default: as the output's name ends, else mermaid."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, instead of printing.", show_default=False)
    ] = None,
) -> None:
    """Draw a topology, as Mermaid text or as an SVG picture."""
    from nodes.plan import prepare

    plan = prepare(topology)
    if form is None:
        form = "svg" if output is not None and output.suffix == ".svg" else "mermaid"
    if form == "svg":
        from nodes.cli._svg import picture

        text = picture(plan)
    else:
        text = mermaid(plan)
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}") from None
    print(f"wrote {output}")
