"""What ``federate`` with ``of`` is made of: what does not go together with it, and the site in the place of a coordinator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nodes.federated import kinds
from nodes.federated.coordinator import Coordinator
from nodes.federated.line import Way
from nodes.federated.machine import Machine
from nodes.federated.options import Of
from nodes.federated.rules import Rules
from nodes.federated.site import ABOVE, Site, client
from nodes.federated.told import Told, endless
from nodes.federated.trust import ClientTrust
from nodes.federated.weights import Weights
from nodes.operator import Context
from nodes.strategies._strategy import Strategy


def lead(
    of: Of | None,
    given: Mapping[str, Any],
    rules: Rules,
    strategy: Strategy,
    model: Weights,
    context: Context,
    theirs: ClientTrust,
    **options: Any,
) -> tuple[Machine, Coordinator, list[Way]]:
    """The machine that leads a job, the coordinator in it, and the buses beside the job's own.

    :param of: the job above; None: there is none.
    :param given: what the user said himself (``fit``, ``rounds``, ``seed``); the rest of ``fit`` is said by the job above.
    :param theirs: whom the half above goes by.
    :param options: further ones of :class:`Coordinator`.
    """
    if of is None:
        coordinator = Coordinator(rules, strategy, model, **options)
        return coordinator, coordinator, []
    below = Told(endless(rules, given.get("fit", {})), strategy, model, seed=given.get("seed"), **options)
    site = Site(below, client(of.job, of.name(context), kinds.compressor, trust=theirs), given.get("rounds", 1))
    return site, below, [Way(ABOVE, of.connect(context), of.root(context), site.linked_above)]
