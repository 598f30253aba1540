"""A round, or a training alone, as a line of the log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nodes import log


def tell(node: str, row: Mapping[str, Any]) -> None:
    """Say how it went.

    :param row: of :func:`nodes.federated.rounds.row`.
    """
    told = {name: round(row[name], 4) for name in ("accuracy", "loss") if math.isfinite(row.get(name, math.nan))}
    if "above" in row:  # at a site
        told["above"] = row["above"]
    if row["status"] != "committed":
        told["why"] = row["why"]
    said = log.info if row["status"] == "committed" else log.warning
    clients, seconds = row["clients"], round(row["seconds"], 3)
    said("round", node=node, round=row["round"], status=row["status"], clients=clients, seconds=seconds, **told)
