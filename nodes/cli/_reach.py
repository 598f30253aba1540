"""From a topology's file to its brokers: where each is, also while it listens on any free port, and how to get in.

What ``tap``, ``ledger`` and ``dead`` share.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodes import running
from schemas.errors import ConfigError

if TYPE_CHECKING:
    from broker.bus import Bus
    from schemas.topology import Topology


@dataclass(frozen=True)
class Place:
    """A topology that may be running.

    :param state: folder of its run's state.
    """

    topology: Topology
    state: Path

    def runs(self) -> bool:
        """Whether a supervisor of it runs on this machine, by this state folder."""
        return bool(running.find(self.state))

    def url(self, broker: str) -> str:
        """Where a broker is.

        :raises ConfigError: it is one that a run starts on any free port, and none runs.
        """
        chosen = self.topology.brokers[broker]
        if chosen.url is not None:
            return chosen.url
        for run in running.find(self.state):
            if (url := run.brokers.get(broker)) is not None:
                return url
        if chosen.listen.endswith(":0"):
            raise ConfigError(
                f"{self.topology.name} does not run here (by its state in {self.state}), and its broker {broker!r} listens "
                "on any free port; start it, name its state folder with --state, or give the broker a port "
                "(listen: 127.0.0.1:1883)"
            )
        return f"mqtt://{chosen.listen}"

    def access(self, broker: str) -> dict[str, Any]:
        """User, password and files for :func:`broker.connect.connect`.

        :raises ConfigError: a secret is not where it should be.
        """
        chosen, base = self.topology.brokers[broker], self.topology.base

        def beside(text: str | None) -> str | None:
            return str(base / Path(text).expanduser()) if text else None

        return {
            "user": chosen.user,
            "password": chosen.password.read(base) if chosen.password is not None else None,
            "ca": beside(chosen.ca),
            "cert": beside(chosen.cert),
            "key": beside(chosen.key),
        }

    def bus(self, broker: str, client_id: str, **options: Any) -> Bus:
        """A client of a broker, not opened yet."""
        from broker.connect import connect

        return connect(self.url(broker), client_id=client_id, **self.access(broker), **options)


def place(path: Path, state: Path | None = None) -> Place:
    """The topology in a file, and where its run keeps its state.

    :raises TopologyError: the file is wrong.
    """
    from nodes import kinds
    from schemas.topology import load

    topology = load(path, kinds=kinds.names("node"))
    return Place(topology, state if state is not None else topology.base / ".penstock" / topology.name)
