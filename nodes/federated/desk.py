"""Where the coordinator takes updates in: who may send one when, what is answered, and what is kept of those that came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from broker.blobs import BlobError
from nodes.federated import wire
from nodes.federated.identity import UNPROVEN, Leader
from nodes.federated.intake import Form, RefusedError, Taken, examine, read
from nodes.federated.job import Job
from nodes.federated.machine import Answer
from nodes.federated.roster import Roster
from nodes.federated.rounds import COLLECTING, Round
from nodes.federated.rules import Rules
from nodes.federated.uploads import Place, Uploads
from nodes.federated.voice import Voice

QUARANTINED = 32
"""Updates that are kept in quarantine."""
QUARANTINE_BYTES = 1 << 20
"""A refused update larger than this is kept as its first bytes."""
OUT_OF_STEP = frozenset({"not-asked", "unknown-client", "future"})
"""Reasons that say nothing against an update; it is not kept."""


SHELVE = 256 * 1024
"""Bytes of an update above which it is not kept in memory once it is committed."""


class Settled(NamedTuple):
    """What became of an update.

    :param reason: empty: it was taken; ``stale``; or why it was refused.
    """

    client: str
    number: int
    reason: str


class Desk:
    """All updates of a job on their way in.

    :param voice: says the answers.
    :param place: where large updates grow.
    :param identity: opens updates, and knows whose they are.
    :ivar taken: (client, round) → update, committed, not yet used.
    :ivar answers: client → the last round for which an update of it was taken.
    :ivar up: bytes that came since it was set to 0.
    """

    def __init__(self, rules: Rules, form: Form, roster: Roster, voice: Voice, place: Place, identity: Leader) -> None:
        self.rules, self.form, self.roster, self.identity = rules, form, roster, identity
        self.kept: Mapping[str, Any] = {}
        """What was committed last."""
        self.taken: dict[tuple[str, int], Taken] = {}
        self.answers: dict[str, int] = {}
        self.up = 0
        self._run = 0
        self._voice = voice
        self._uploads = Uploads(wire.room(form.wanted), place)
        self._quarantine: list[str] = []

    def begin(self, kept: Mapping[str, Any], run: int) -> None:
        """Begin, or go on with what was committed."""
        self.kept, self._run = kept, run
        for key in list(kept):
            if key.startswith(("answer/", "update/", "quarantine/")):
                self._resume(key, run)

    def _resume(self, key: str, run: int) -> None:
        kind, *_, client = key.split("/")
        match kind:
            case "answer":
                self.answers[client] = self.kept[key]
            case "update":
                update = read(self.kept[key], client, self.rules.job, run)
                self.taken[client, update.round] = self._lean(update)
            case "quarantine":
                self._quarantine.append(key)

    # -- what is heard ----------------------------------------------------------------------------------------------

    def heard(
        self, client: str, what: str, payload: bytes, job: Job, held: Round | None, now: int, out: Answer
    ) -> Settled | None:
        """A client said something on one of its topics ``up``, ``offer``, ``blob``.

        :raises PayloadError: it is no offer.
        """
        self.up += len(payload)
        if what == "offer":
            return self._offered(client, payload, job, held, now, out)
        if what == "blob":
            try:
                said, whole = self._uploads.took(client, payload, now)
            except BlobError:
                return None  # it is gone from the disk; the client offers it again
            self._have(client, said, out)
            return None if whole is None else self._update(client, whole, job, held, now, out)
        return self._update(client, payload, job, held, now, out)

    def _update(
        self, client: str, payload: bytes, job: Job, held: Round | None, now: int, out: Answer
    ) -> Settled | None:
        number = job.number
        try:
            payload = self.identity.update(client, payload, job.run)
            update = read(payload, client, self.rules.job, job.run)
            number = update.round
            if (settled := self._known(client, number, job, held, out)) is not None:
                return settled
            self._admit(client, number, job, held)
            examine(update, job.bases[number][0], self.form, self.rules.limits, job.largest)
        except RefusedError as error:
            return self._refuse(client, number, error, payload, job, now, out)
        self.taken[client, number] = self._lean(update)
        self.answers[client] = number
        out.commit[update.key] = update.payload
        out.commit[f"answer/{client}"] = number
        self._voice.ack(job, client, number, wire.TAKEN, out)
        return Settled(client, number, "")

    def _offered(
        self, client: str, payload: bytes, job: Job, held: Round | None, now: int, out: Answer
    ) -> Settled | None:
        parcel = wire.hear(wire.Parcel, payload)
        try:
            if parcel.run != job.run:
                raise RefusedError("job", "an update of another run")
            if (settled := self._known(client, parcel.round, job, held, out)) is not None:
                return settled
            self._admit(client, parcel.round, job, held)
            said, whole = self._uploads.offered(client, parcel, now)
            self._have(client, said, out)
        except RefusedError as error:
            return self._refuse(client, parcel.round, error, payload, job, now, out)
        except BlobError as error:
            refused = RefusedError(error.reason, str(error))
            return self._refuse(client, parcel.round, refused, payload, job, now, out)
        return None if whole is None else self._update(client, whole, job, held, now, out)

    def _have(self, client: str, said: bytes | None, out: Answer) -> None:
        if said is not None:
            self._voice.say(out, f"c/{client}/have", said)

    def _known(self, client: str, number: int, job: Job, held: Round | None, out: Answer) -> Settled | None:
        """What is to be said of an update without looking at it: it is there already, or too late."""
        if self.answers.get(client) == number:
            self._voice.ack(job, client, number, wire.TAKEN, out)
            return Settled(client, number, "")
        if self._late(client, number, job, held):
            self._voice.ack(job, client, number, wire.STALE, out)
            return Settled(client, number, wire.STALE)
        return None

    def _late(self, client: str, number: int, job: Job, held: Round | None) -> bool:
        if not 1 <= number <= job.number:
            return False
        if self.rules.buffer is None:
            return held is None or number != held.number or held.phase != COLLECTING
        return number not in job.bases or number < self.answers.get(client, 0)

    def _admit(self, client: str, number: int, job: Job, held: Round | None) -> None:
        """Whether that client may answer that round, which it is not too late for.

        :raises RefusedError: it may not.
        """
        if not 1 <= number <= job.number:
            raise RefusedError("future", f"round {number}, the last one called is {job.number}")
        if client not in self.roster.members:
            raise RefusedError("unknown-client", f"nobody of the name {client[:64]!r} has joined")
        if self.rules.buffer is None and (held is None or client not in held.asked):
            raise RefusedError("not-asked", f"{client} is not asked in round {number}")

    def _refuse(
        self, client: str, number: int, why: RefusedError, payload: bytes, job: Job, now: int, out: Answer
    ) -> Settled | None:
        """It does not count, and is kept to be looked at: one for each client and round, and the last few."""
        text = str(why)[:300]
        self._voice.ack(job, client, number, wire.REFUSED, out, why.reason, text)
        if why.reason not in UNPROVEN:  # else another's word would end what this client is sending
            self._uploads.forget(client)
        if why.reason in OUT_OF_STEP:
            return None
        key = f"quarantine/{number}/{client}"
        if key not in self._quarantine:
            self._quarantine.append(key)
        if len(self._quarantine) > QUARANTINED:
            out.commit[self._quarantine.pop(0)] = None
        kept = {"reason": why.reason, "detail": text, "time": now, "size": len(payload)}
        out.commit[key] = {**kept, "payload": bytes(payload[:QUARANTINE_BYTES])}
        return Settled(client, number, why.reason)

    def wake(self) -> int | None:
        """When :meth:`tick` is wanted."""
        return self._uploads.wake()

    def tick(self, now: int, out: Answer) -> None:
        """Uploads that have come to a halt."""
        for client, said in self._uploads.due(now):
            self._have(client, said, out)

    def _lean(self, update: Taken) -> Taken:
        return update.shelved() if len(update.payload) > SHELVE else update

    def recall(self, update: Taken) -> Taken:
        """A shelved update with its arrays; called in the thread that aggregates, after it was committed."""
        return read(self.kept[update.key], update.client, self.rules.job, self._run)

    # -- what is used -----------------------------------------------------------------------------------------------

    def chosen(self, counted: Sequence[tuple[str, int]], job: Job) -> list[tuple[Taken, int]]:
        """Those updates, each with its staleness."""
        updates = [self.taken[pair] for pair in counted]
        return [(u, max(0, job.version - job.bases.get(u.round, ("", job.version))[1])) for u in updates]

    def forget(self, gone: Sequence[tuple[str, int]] | None, out: Answer) -> None:
        """They were used, or their round is dead; None: all that there are, and those on their way."""
        if gone is None:
            gone = list(self.taken)
            self._uploads.forget()
        for client, number in gone:
            self.taken.pop((client, number), None)
            out.commit[f"update/{number}/{client}"] = None
