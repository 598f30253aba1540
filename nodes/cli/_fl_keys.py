"""``penstock fl key`` and ``penstock fl rights``: who a party of a job is, and what it may do at the broker."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.errors import ConfigError

if TYPE_CHECKING:
    from nodes.federated.rights import Rights
    from nodes.planned import PlannedNode


def key(path: Path, *, public: bool, as_json: bool) -> int:
    """Make a private key, or only look at one; say its public key.

    :raises ConfigError: the file is there (``public``: is not), or is not a key, or cannot be written.
    :raises MissingError: the library is not installed.
    """
    from nodes.federated import keyring
    from nodes.privacy.keys import Signer

    if public:
        signer = Signer(keyring.read_private(path))
    else:
        signer = Signer()
        keyring.write_private(path, signer.private())
    text = keyring.text_of(signer.public)
    print(json.dumps({"file": str(path), "public": text}) if as_json else text)
    if not public and not as_json:
        print(f"wrote {path}: the private key, for this device alone; above is its public one", file=sys.stderr)
    return 0


def rights(path: Path, job: str | None, readers: list[str], *, mosquitto: bool, as_json: bool) -> int:
    """Print the rights of all parties of the topology's jobs.

    :raises ConfigError: there is no job, or none of that name.
    """
    from nodes.cli._books import table
    from nodes.federated import rights as of

    found = parties(path, job, readers)
    for user, those in _shared(found).items():
        print(
            f"warning: {', '.join(those)} log in as the same user {user!r}: the broker cannot keep them apart",
            file=sys.stderr,
        )
    if mosquitto:
        print(of.mosquitto(found), end="")
    elif as_json:
        print(json.dumps([_plain(each) for each in found], ensure_ascii=False))
    else:
        rows = [("user", "role", "job", "right", "topic")]
        for each in found:
            for right, topics in (("publish", each.publish), ("subscribe", each.subscribe)):
                rows += [(each.user, each.role, each.job, right, topic) for topic in topics]
        print("\n".join(table(rows)))
    return 0


def _plain(each: Rights) -> dict[str, Any]:
    return {
        "user": each.user,
        "role": each.role,
        "job": each.job,
        "node": each.node,
        "publish": list(each.publish),
        "subscribe": list(each.subscribe),
    }


def _shared(found: list[Rights]) -> dict[str, list[str]]:
    """User → the nodes that log in so, where there are several of which one is a client."""
    nodes: dict[str, dict[str, str]] = {}
    for each in found:
        nodes.setdefault(each.user, {})[each.node] = each.role
    return {user: list(those) for user, those in nodes.items() if len(those) > 1 and "client" in those.values()}


def parties(path: Path, job: str | None, readers: list[str]) -> list[Rights]:
    """The rights of the nodes of all jobs in a topology, and of those who only look.

    :raises TopologyError: the file is wrong.
    :raises ConfigError: it has no job, or none of that name.
    """
    from nodes.federated import rights as of
    from nodes.plan import prepare
    from nodes.planned_jobs import LEAD, MEMBERS
    from schemas import topics
    from schemas.errors import did_you_mean

    plan = prepare(path)
    found: list[Rights] = []
    for node in plan.nodes.values():
        known: Any = node.config
        name = getattr(known, "job", None) if node.kind in MEMBERS | {"infer", "pool"} else None
        if name is None:
            continue
        root = topics.federated(plan.topology.name, name)
        at = _broker(node)
        user = (plan.topology.brokers[at].user if at in plan.topology.brokers else None) or None
        if node.kind == "pool":
            found.append(of.rights(user or node.name, "giver", name, node.name, root, known.client or node.name))
        elif node.kind in MEMBERS - LEAD and getattr(known, "alone", None) is None:
            client = known.client or node.name
            found.append(of.rights(user or client, "client", name, node.name, root, client))
        elif node.kind in MEMBERS:
            found.append(of.rights(user or node.name, "coordinator", name, node.name, root))
            if getattr(known, "pool", None) is not None:
                found.append(of.rights(user or node.name, "taker", name, node.name, root))
            if (above := getattr(known, "of", None)) is not None:
                client = above.name(node.context)
                there = plan.topology.brokers.get(above.broker or node.broker)
                who = (there.user if there is not None else None) or client
                found.append(of.rights(who, "client", above.job, node.name, above.root(node.context), client))
        else:
            found.append(of.rights(user or node.name, "follower", name, node.name, root, _follower(node)))
    jobs = list(dict.fromkeys(each.job for each in found))
    if not jobs:
        raise ConfigError(f"{path} has no federated job: no node is of the kind train or federate, or infer with a job")
    if job is not None and job not in jobs:
        raise ConfigError(f"there is no job {job!r}{did_you_mean(job, jobs)}")
    for name in jobs:
        found += [of.rights(u, "reader", name, "", topics.federated(plan.topology.name, name)) for u in readers]
    return [each for each in found if job in {None, each.job}]


def _broker(node: PlannedNode) -> str:
    """The broker that it meets the job at."""
    return getattr(node.config, "broker", None) or node.broker


def _follower(node: PlannedNode) -> str:
    from nodes.federated.following import name_of

    return name_of(node.context)
