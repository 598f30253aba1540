"""``penstock model``: what is in a model's file, how right it is, how to make it small, where it can be cut in two."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from schemas.errors import ConfigError


class Action(StrEnum):
    """What to do."""

    SHOW = "show"
    EVALUATE = "evaluate"
    SPLIT = "split"
    PLAN = "plan"
    COMPRESS = "compress"


def command(
    action: Annotated[
        Action,
        typer.Argument(
            help="show: inputs, outputs, size and digest; evaluate: accuracy on examples with known answers; split, plan: in two"
            " parts, and where; compress: smaller."
        ),
    ],
    models: Annotated[
        list[Path],
        typer.Argument(help="Model files, or topologies: their infer nodes, with the preprocess nodes before them."),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="evaluate: an .npz file (images, labels), or a folder with a folder of images for each class."
        ),
    ] = None,
    x: Annotated[str, typer.Option(help="evaluate: the .npz file's array of inputs.")] = "images",
    y: Annotated[str, typer.Option(help="evaluate: its array of labels.")] = "labels",
    labels: Annotated[Path | None, typer.Option(help="Names of the model's classes, one a line.")] = None,
    infer: Annotated[
        str,
        typer.Option(
            help="Options of the node infer as YAML, e.g. '{scale: 1/255, backend: {onnx: {providers: [CUDA]}}}'."
        ),
    ] = "{}",
    steps: Annotated[
        str, typer.Option(help="Steps of preprocess before the model, as YAML, e.g. '[{resize: [96, 96]}]'.")
    ] = "[]",
    to: Annotated[
        str, typer.Option(help="compress: int8, int8-dynamic (inputs stay real), int8-weights, int16, int4-dynamic.")
    ] = "int8",
    limit: Annotated[float, typer.Option(min=0, help="compress: points of accuracy that may be lost.")] = 0.5,
    at: Annotated[
        str | None, typer.Option(help="split: the tensor, or the number of the cut; left out: all are listed.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the parts (split), file for this machine's profile (plan), or the small model (compress)."
        ),
    ] = None,
    there: Annotated[
        Path | None, typer.Option(help="plan: the profile that plan --out wrote on the far machine.")
    ] = None,
    faster: Annotated[
        float,
        typer.Option(min=0.01, help="plan: without --there, how many times faster the far machine is than this one."),
    ] = 1.0,
    link: Annotated[str, typer.Option(help="plan: what the link carries, e.g. 1Mbit/s.")] = "10Mbit/s",
    delay: Annotated[str, typer.Option(help="plan: one way, e.g. 20ms.")] = "5ms",
    least: Annotated[str, typer.Option(help="plan: what is to be small: latency, bytes or energy.")] = "latency",
    watts: Annotated[float, typer.Option(min=0, help="plan: what this machine takes while it computes, W.")] = 5.0,
    joules: Annotated[float, typer.Option(min=0, help="plan: what sending a megabyte takes, J.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Models: what they take and give, how right they are, one made small, and one in two parts on two machines."""
    if action is Action.SHOW:
        from nodes.cli import _signature

        return _signature.run(models, as_json=as_json)
    if action is Action.EVALUATE:
        from nodes.cli import _evaluate

        if data is None:
            raise ConfigError(
                "evaluate needs examples: --data FILE.npz, or a folder with a folder of images for each class"
            )
        return _evaluate.run(models, data, x, y, labels, infer, steps, as_json=as_json)
    if len(models) != 1:
        raise ConfigError(f"{action} takes one model")
    if action is Action.COMPRESS:
        from nodes.cli import _compress

        if data is None:
            raise ConfigError(
                "compress needs examples, to calibrate on and to see what is lost: --data FILE.npz, or a folder"
            )
        return _compress.run(models[0], data, x, y, labels, infer, steps, to, limit, out, as_json=as_json)
    from nodes.cli import _split

    if action is Action.SPLIT:
        return _split.split(models[0], at, out, as_json=as_json)
    aim = _split.Aim(link, delay, least, watts, joules)
    return _split.plan(models[0], aim, there, faster, out, as_json=as_json)
