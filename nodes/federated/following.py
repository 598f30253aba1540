"""What ``infer`` with ``job`` does beside inferring: it takes over each global model of the job, between two batches."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, Protocol

from nodes import log
from nodes.federated import file, key_options, wire
from nodes.federated.follower import Follower
from nodes.federated.party import Party
from nodes.federated.store import Store
from nodes.federated.weights import Weights
from nodes.operator import Context
from schemas import topics
from schemas.errors import PenstockError
from schemas.messages import Model


class Exchanges(Protocol):
    """What :func:`follow` needs of the operator."""

    def exchange(self, path: Path, model: Model) -> None:
        """Answer with that model from now on."""


def name_of(context: Context) -> str:
    """Under which it asks for what it lacks of a model, on the job's topics."""
    return topics.level(f"{context.state.name}-model")


async def follow(operator: Exchanges, context: Context, job: str, path: Path, coordinator: str | None = None) -> None:
    """Until cancelled.

    :param path: where the newest model is kept.
    :param coordinator: whose models are taken over, as the option of that name says; None: all.
    """

    def take(manifest: wire.Manifest, weights: Weights) -> None:
        version = f"{manifest.version}"
        try:
            file.write(path, weights)
            with path.open("rb") as written:
                digest = hashlib.file_digest(written, "sha256").hexdigest()
            operator.exchange(path, Model(name=job, version=version, digest=digest))
        except (PenstockError, OSError) as error:
            log.error(
                "the job's model was not taken over", node=context.node, job=job, version=version, reason=str(error)
            )
        else:
            log.info("model exchanged", node=context.node, job=job, version=version, round=manifest.round)

    def connect(**options: Any) -> Any:
        return context.bus(None, f"{context.state.name}-model", patience=math.inf, **options)

    public = key_options.client_trust(None, coordinator, context).coordinator
    machine = Follower(job, name_of(context), take, public)
    party = Party(machine, Store(None), connect, topics.federated(context.topology, job), node=context.node, job=job)
    try:
        await party.open()
        await party.run()
    finally:
        await party.close()
