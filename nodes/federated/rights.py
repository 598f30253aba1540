"""Who may say and hear what on the topics of a job: the least with which it runs, for a broker that keeps the parties apart.

With these no client reads another's update, or writes in another's name, or in the coordinator's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from schemas.errors import ConfigError

MODEL = ("model", "blob/+")
SAID_BY_CLIENTS = ("state", "up", "offer", "blob", "need", "ask", "part")
HEARD_BY_CLIENTS = ("ack", "have", "state", "inbox")
SUMS = "r/+/+"
"""What the coordinator says of a secure sum to all who are in it."""
GIVEN = ("up", "offer", "blob", "withdraw")
""":mod:`nodes.federated.giver`: below ``p/<client>/``."""


@dataclass(frozen=True, slots=True)
class Rights:
    """One party of a job.

    :param user: as which it is to log in at the broker.
    :param role: ``client``, ``giver``, ``coordinator``, ``follower`` or ``reader``.
    :param node: its node; empty with a reader.
    :param publish: topic filters, whole: with the topology and the job before them.
    """

    user: str
    role: str
    job: str
    node: str
    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def client(name: str) -> tuple[Sequence[str], Sequence[str]]:
    """What a client may publish, and what it may hear: topics of the job."""
    return [f"c/{name}/{what}" for what in SAID_BY_CLIENTS], [
        "round",
        *MODEL,
        SUMS,
        *(f"c/{name}/{what}" for what in HEARD_BY_CLIENTS),
    ]


def coordinator() -> tuple[Sequence[str], Sequence[str]]:
    """Likewise of the coordinator."""
    says = ["round", "ordered", *MODEL, SUMS, "c/+/ack", "c/+/have", "c/+/inbox"]
    return says, ["round", "order", *(f"c/+/{what}" for what in SAID_BY_CLIENTS)]


def taker() -> tuple[Sequence[str], Sequence[str]]:
    """Likewise of who takes what is given to the job's pool, beside those of a coordinator."""
    return ["pool", "p/+/ack", "p/+/have"], [f"p/+/{what}" for what in GIVEN]


def giver(name: str) -> tuple[Sequence[str], Sequence[str]]:
    """Likewise of a gateway that gives to the job's pool."""
    return [f"p/{name}/{what}" for what in GIVEN], ["pool", f"p/{name}/ack", f"p/{name}/have"]


def follower(name: str) -> tuple[Sequence[str], Sequence[str]]:
    """Likewise of who takes the models over (``infer`` with ``job``), under its name on the job's topics."""
    return [f"c/{name}/need"], list(MODEL)


def reader() -> tuple[Sequence[str], Sequence[str]]:
    """Likewise of who only looks (``penstock fl status``)."""
    return [], ["round", "model", "c/+/state"]


def rights(user: str, role: str, job: str, node: str, root: str, name: str = "") -> Rights:
    """Those of one party.

    :param root: what the job's topics begin with.
    :param name: of a client or a follower on them.
    """
    publish, subscribe = {
        "client": lambda: client(name),
        "giver": lambda: giver(name),
        "coordinator": coordinator,
        "taker": taker,
        "follower": lambda: follower(name),
        "reader": reader,
    }[role]()
    return Rights(user, role, job, node, tuple(f"{root}/{t}" for t in publish), tuple(f"{root}/{t}" for t in subscribe))


def mosquitto(found: Iterable[Rights]) -> str:
    """All of them as an ``acl_file`` of mosquitto.

    :raises ConfigError: a user's name cannot stand there.
    """
    users: dict[str, list[Rights]] = {}
    for each in found:
        if not each.user.isprintable() or each.user != each.user.strip():
            raise ConfigError(f"{each.user!r} cannot be a user in mosquitto's file")
        users.setdefault(each.user, []).append(each)
    lines = ["# Rights of the parties of federated jobs, for acl_file of mosquitto."]
    lines.append("# Without 'allow_anonymous false' and a password_file anybody is anybody.")
    for user, parties in users.items():
        lines += ["", f"user {user}"]
        for party in parties:
            lines.append(f"# {party.role} of {party.job}")
            lines += [f"topic write {topic}" for topic in party.publish]
            lines += [f"topic read {topic}" for topic in party.subscribe]
    return "\n".join(lines) + "\n"
