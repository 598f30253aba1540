"""``penstock fl rollback``: tell the node that leads a job to go back to an older model."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any

from schemas.errors import RunError

if TYPE_CHECKING:
    from broker.bus import Bus
    from nodes.cli._jobs import Job
    from nodes.cli._reach import Place
    from nodes.federated.identity import Leader
    from nodes.federated.past import Order, Ordered

AGAIN = 1.0
"""Seconds after which it is said again."""
PATIENCE = 20.0
"""Seconds that the leader may take; it may be adding up a round."""


async def rollback(place: Place, job: Job, to: int | None) -> str:
    """Go back, and give what was done in a sentence.

    :param to: a version; None: the one before.
    :raises RunError: nobody leads the job now, or it cannot be done.
    """
    from nodes.cli import _jobs
    from nodes.federated.past import BEFORE, Order

    if why := await _jobs.listen(place, job):
        raise RunError(f"job {job.name}: {why}")
    if job.model is None or job.call is None:
        raise RunError(f"job {job.name}: nothing is heard of it")
    if job.call.phase == "over":
        raise RunError(f"job {job.name} is over ({job.call.why}); its last model stays")
    order = Order(os.urandom(8).hex(), job.model.run, BEFORE if to is None else to, job.model.version)
    bus = _jobs.bus_of(place, job)
    await bus.open()
    try:
        async with asyncio.timeout(PATIENCE):
            done = await _ordered(bus, f"{place.topology.name}/fed/{job.name}", order, _identity(job))
    except TimeoutError:
        raise RunError(f"job {job.name}: the node that leads it does not answer; does it run?") from None
    finally:
        await bus.close()
    if done.refused:
        raise RunError(f"job {job.name}: {done.refused}")
    return f"job {job.name}: version {done.version} is the model of version {done.of} again"


def _identity(job: Job) -> Leader:
    """Speaks with the key of the node that leads, where it has one.

    :raises ConfigError: its key is not on this machine.
    """
    from nodes.federated import key_options
    from nodes.federated.identity import Leader
    from nodes.federated.trust import CoordinatorTrust

    if job.leads is None:
        return Leader(job.name, CoordinatorTrust())
    config: Any = job.leads.config
    return Leader(job.name, key_options.coordinator_trust(config.key, None, job.leads.context))


async def _ordered(bus: Bus, root: str, order: Order, identity: Leader) -> Ordered:
    """Say it until it is answered."""
    import msgspec

    from broker.bus import Publication
    from nodes.federated import wire
    from nodes.federated.past import Ordered, heard
    from schemas.errors import PayloadError

    subscription = await bus.subscribe([f"{root}/ordered"])
    while True:
        await bus.publish([Publication(f"{root}/order", identity.say("order", msgspec.msgpack.encode(order)), 1)])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(AGAIN):
                while True:
                    deliveries = await subscription.receive()
                    subscription.acknowledge(deliveries)
                    for delivery in deliveries:
                        with contextlib.suppress(PayloadError):
                            payload = bytes(delivery.payload)
                            signed = wire.signed(payload)
                            if (
                                done := heard(Ordered, payload if signed is None else signed.message)
                            ).ident == order.ident:
                                return done
