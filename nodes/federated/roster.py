"""Who is there to be asked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np

from nodes.federated.wire import Presence

MOST = 100_000
"""Clients that a job may have; whoever comes then is passed over."""


class Roster:
    """The clients of a job as they last said.

    :param form: of the job's model; clients with another one are known but not asked.
    """

    def __init__(self, form: str) -> None:
        self.form = form
        self.members: dict[str, Presence] = {}
        self.fit: set[str] = set()
        """Those that can be asked."""

    def load(self, name: str, kept: Any) -> None:
        """What :meth:`hear` gave for a client, as it was committed."""
        self.hear(name, msgspec.convert(kept, Presence))

    def hear(self, name: str, said: Presence) -> Any:
        """A client said how it is; what is to be committed, or None where that changes nothing."""
        before = self.members.get(name)
        if before is None and len(self.members) >= MOST:
            return None
        self.members[name] = said
        if said.here and said.form == self.form and said.samples > 0:
            self.fit.add(name)
        else:
            self.fit.discard(name)
        return None if said == before else msgspec.to_builtins(said)

    def able(self, name: str, number: int) -> bool:
        """Whether it may still answer that round."""
        return name in self.fit and self.members[name].skips != number

    def choose(self, n: int, seed: int, number: int, *, without: Iterable[str] = ()) -> list[str]:
        """``n`` clients at random, sorted by name: the same of the same clients on any machine.

        :param without: those that are not to be chosen.
        """
        from_them = sorted(name for name in self.fit.difference(without) if self.members[name].skips != number)
        if n >= len(from_them):
            return from_them
        drawn = np.random.default_rng([seed, number, len(from_them)]).choice(len(from_them), n, replace=False)
        return sorted(from_them[i] for i in drawn)

    def cohort(self, n: int, seed: int, number: int, silent: Iterable[str]) -> list[str]:
        """``n`` clients for a new round, if there are so many.

        :param silent: those who kept silent in the round before: they have another chance if there are not enough others.
        """
        asked = self.choose(n, seed, number, without=silent)
        return asked if len(asked) >= n else self.choose(n, seed, number)
