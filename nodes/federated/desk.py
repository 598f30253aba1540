"""Where the coordinator takes updates in: who may send one when, and what is kept of those that came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nodes.compressors._compressor import Compressor
from nodes.federated.intake import RefusedError, Taken, examine, read
from nodes.federated.job import Job
from nodes.federated.machine import Answer
from nodes.federated.roster import Roster
from nodes.federated.rounds import COLLECTING, Round
from nodes.federated.rules import Rules
from nodes.federated.weights import Shape

QUARANTINED = 32
"""Updates that are kept in quarantine."""
QUARANTINE_BYTES = 1 << 20
"""A refused update larger than this is kept as its first bytes."""


class Desk:
    """Where the coordinator takes updates in: those of this round, what was answered to whom, and what was refused.

    :param extras: what the strategy wants beside the delta.
    :ivar taken: (client, round) → update, committed, not yet used.
    :ivar answers: client → the last round for which an update of it was taken.
    """

    def __init__(
        self, rules: Rules, wanted: tuple[Shape, ...], extras: tuple[Shape, ...], compressor: Compressor | None
    ) -> None:
        self.rules, self.wanted, self.extras, self.compressor = rules, wanted, extras, compressor
        self.taken: dict[tuple[str, int], Taken] = {}
        self.answers: dict[str, int] = {}
        self._quarantine: list[str] = []

    def resume(self, key: str, value: Any, run: int) -> None:
        """One of the things that were committed here."""
        kind, *_, client = key.split("/")
        match kind:
            case "answer":
                self.answers[client] = value
            case "update":
                update = self.read(value, client, run)
                self.taken[client, update.round] = update
            case "quarantine":
                self._quarantine.append(key)

    def read(self, payload: bytes, client: str, run: int) -> Taken:
        """See :func:`read`."""
        return read(payload, client, self.rules.job, run)

    def late(self, client: str, number: int, job: Job, held: Round | None) -> bool:
        """Whether an update for that round comes too late."""
        if not 1 <= number <= job.number:
            return False
        if self.rules.buffer is None:
            return held is None or number != held.number or held.phase != COLLECTING
        return number not in job.bases or number < self.answers.get(client, 0)

    def admit(self, client: str, number: int, job: Job, held: Round | None, roster: Roster) -> None:
        """Whether that client may answer that round, which it is not too late for.

        :raises RefusedError: it may not.
        """
        if not 1 <= number <= job.number:
            raise RefusedError("future", f"round {number}, the last one called is {job.number}")
        if client not in roster.members:
            raise RefusedError("unknown-client", f"nobody of the name {client[:64]!r} has joined")
        if self.rules.buffer is None and (held is None or client not in held.asked):
            raise RefusedError("not-asked", f"{client} is not asked in round {number}")

    def examine(self, update: Taken, job: Job) -> None:
        """See :func:`examine`; its round is one of the last."""
        base = job.bases[update.round][0]
        examine(update, base, self.wanted, self.extras, self.compressor, self.rules.limits, job.largest)

    def take(self, update: Taken, out: Answer) -> None:
        """It counts."""
        client, number = update.client, update.round
        self.taken[client, number] = update
        self.answers[client] = number
        out.commit[f"update/{number}/{client}"] = update.payload
        out.commit[f"answer/{client}"] = number

    def quarantine(
        self, client: str, number: int, reason: str, text: str, payload: bytes, now: int, out: Answer
    ) -> None:
        """It does not, and is kept to be looked at: one for each client and round, and the last few."""
        key = f"quarantine/{number}/{client}"
        if key not in self._quarantine:
            self._quarantine.append(key)
        if len(self._quarantine) > QUARANTINED:
            out.commit[self._quarantine.pop(0)] = None
        kept = {"reason": reason, "detail": text, "time": now, "size": len(payload)}
        out.commit[key] = {**kept, "payload": bytes(payload[:QUARANTINE_BYTES])}

    def chosen(self, counted: Sequence[tuple[str, int]], job: Job) -> list[tuple[Taken, int]]:
        """Those updates, each with its staleness."""
        updates = [self.taken[pair] for pair in counted]
        return [(u, max(0, job.version - job.bases.get(u.round, ("", job.version))[1])) for u in updates]

    def forget(self, gone: Sequence[tuple[str, int]], out: Answer) -> None:
        """They were used, or their round is dead."""
        for client, number in gone:
            self.taken.pop((client, number), None)
            out.commit[f"update/{number}/{client}"] = None
