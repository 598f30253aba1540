"""A coordinator's side of secure sums: it asks for keys, shares, masked updates and what takes the masks off their sum.

Keys → shares → collecting → (agreeing) → unmasking. What a client says is committed as it came, before anything follows of it; a
coordinator that was killed says it again to the sum's machine (:class:`nodes.privacy.secure_sum.Server`), and goes on in the same
phase. Masked updates are updates like others: they come, are kept and answered at the desk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from nodes.federated import wire
from nodes.federated.desk import Desk
from nodes.federated.intake import Form, Taken
from nodes.federated.job import Job
from nodes.federated.machine import Answer
from nodes.federated.roster import Roster
from nodes.federated.rounds import AGGREGATING, COLLECTING, Evaluate, Merged, Round, made
from nodes.federated.rules import Rules, ns
from nodes.federated.trust import CoordinatorTrust
from nodes.federated.voice import Voice
from nodes.federated.weights import Shape, Weights
from nodes.federated.wire import AGREEING, KEYS, MASKED_NUMBERS, SHARES, UNMASKING
from nodes.privacy.secure_sum import SecureSumError, Server
from nodes.privacy.secure_terms import Agreement, Key, Reveal, Shares, terms_of, unpack
from nodes.strategies._strategy import ClientUpdate, Strategy
from schemas.errors import PenstockError
from schemas.messages import Array

_TIMES: dict[str, float] = {KEYS: 3, SHARES: 3, COLLECTING: 8, AGREEING: 1.5, UNMASKING: 1.5}
"""How the time until the deadline is divided among a phase and those that follow."""
_STEPS: dict[str, tuple[str, type[Key | Shares | Agreement | Reveal]]] = {
    "key": (KEYS, Key),
    "share": (SHARES, Shares),
    "agree": (AGREEING, Agreement),
    "reveal": (UNMASKING, Reveal),
}
_DID = {
    KEYS: "sent their keys",
    SHARES: "shared their secrets",
    COLLECTING: "sent their masked updates",
    AGREEING: "signed the list of those in the sum",
    UNMASKING: "gave their shares back",
}
_MOST = 2**31 - 1
_PASSED_OVER = frozenset({"early", "garbled", "signature", "unknown"})
"""Reasons for which a step is not taken, and nothing else: somebody else may have written it."""


def size_of(wanted: Sequence[Shape]) -> int:
    """Numbers of one update."""
    return sum(shape.size for shape in wanted)


def masked_form(wanted: Sequence[Shape]) -> Form:
    """What an update to a secure sum has to be."""
    return Form((Shape(MASKED_NUMBERS, (size_of(wanted) + 1,), "<u4"),), (), None)


class SecureRound:
    """The secure sum of the round under way.

    :param quorum: clients without which a round comes to nothing.
    :param wanted: the model's form.
    """

    def __init__(
        self,
        rules: Rules,
        quorum: int,
        wanted: tuple[Shape, ...],
        roster: Roster,
        desk: Desk,
        voice: Voice,
        trust: CoordinatorTrust,
    ) -> None:
        self.rules, self.quorum, self.wanted = rules, quorum, wanted
        self.roster, self.desk, self.voice, self.trust = roster, desk, voice, trust
        self._server: Server | None = None
        self._stored: dict[str, None] = {}
        self._until = 0
        self._run = 0

    # -- beginning --------------------------------------------------------------------------------------------------

    def begin(self, job: Job, held: Round, now: int) -> None:
        """A round begins: these are its terms, and keys are asked for."""
        secure, clients = self.rules.secure, held.size
        if secure is None:
            return
        most = 1
        if not secure.equal:  # as fine as it can be for those there are: a number is rounded to clip / most
            there = (self.roster.members[name].samples for name in self.roster.fit)
            most = min(self.rules.limits.samples, max(there, default=1), _MOST // clients)
        held.secure = {
            "epoch": job.epoch,
            "size": size_of(self.wanted),
            "clients": clients,
            "clip": secure.clip,
            "most": most,
            "least": secure.least,
            "threshold": secure.threshold,
            "degree": secure.degree,
            "agreed": secure.agreed,
        }
        self._open(job, held)
        held.token = self._sum.terms.context.hex()
        self._enter(held, KEYS, now)

    def _open(self, job: Job, held: Round) -> None:
        terms = terms_of(self.rules.job, held.number, held.secure)
        self._run, self._stored = job.run, {}
        self._server = Server(terms, signer=self.trust.signer, devices=self.trust.devices)

    @property
    def _sum(self) -> Server:
        if self._server is None:
            raise RuntimeError("there is no secure sum under way")
        return self._server

    def resume(self, kept: Mapping[str, Any], job: Job, held: Round, now: int) -> str:
        """Go on with what was committed; why that cannot be, or empty."""
        self._stored = {key: None for key in kept if key.startswith("secure/")}
        if (self.rules.secure is None) != (not held.secure):
            return "the job's 'secure' was changed while it was under way"
        if not all(pair in self.desk.taken for pair in held.counted):
            return "an update that it was made of is not on the disk any more"
        if not held.secure:
            return ""
        stored, phases = self._stored, list(_TIMES)
        at = len(phases) if held.phase == AGGREGATING else phases.index(held.phase)
        try:
            self._open(job, held)
            for what, phase, close in (
                ("key", KEYS, self._sum.roster),
                ("share", SHARES, self._sum.inboxes),
                ("", COLLECTING, self._sum.survivors),
                ("agree", AGREEING, self._sum.agreements),
                ("reveal", UNMASKING, None),
            ):
                if at < phases.index(phase) or (phase == AGREEING and not self._sum.terms.agreed):
                    continue
                for key in stored:
                    if what and key.startswith(f"secure/{what}/"):
                        getattr(self._sum, what)(kept[key])
                if phase == COLLECTING and at > phases.index(COLLECTING):
                    for client, _ in held.counted:
                        self._sum.came(client)
                if close is not None and at > phases.index(phase):
                    close()
        except PenstockError as error:  # other keys of devices than before, or another threshold
            return f"what was said for its secure sum does not hold any more: {error}"
        finally:
            self._stored = stored
        if held.phase != AGGREGATING:
            self._enter(held, held.phase, now)
        return ""

    def _enter(self, held: Round, phase: str, now: int) -> None:
        """The next phase: until when, and for whom it waits."""
        held.phase, held.enough = phase, None
        later = list(_TIMES)[list(_TIMES).index(phase) :]
        if not self._sum.terms.agreed and phase != AGREEING:
            later = [name for name in later if name != AGREEING]
        share = _TIMES[phase] / sum(_TIMES[name] for name in later)
        self._until = now + int(max(0, held.deadline - now) * share)
        held.waiting = {name for name in self._missing(held) if self._able(name, held)}

    def _missing(self, held: Round) -> Iterator[str]:
        """Those whose part in this phase has not come."""
        if held.phase == KEYS:
            return (name for name in held.asked if not self._sum.has_key(name))
        if held.phase == COLLECTING:
            return (name for name in self._sum.waiting if (name, held.number) not in self.desk.taken)
        return iter(self._sum.waiting)

    def _able(self, client: str, held: Round) -> bool:
        return self.roster.able(client, held.number) and client not in held.refused

    # -- what is heard ----------------------------------------------------------------------------------------------

    def seen(self, client: str, held: Round) -> None:
        """A client said how it is."""
        if not self._able(client, held):
            held.waiting.discard(client)
        elif client not in held.waiting and client in self._missing(held):
            held.waiting.add(client)

    def heard(self, client: str, payload: bytes, held: Round | None, out: Answer) -> None:
        """A client's step in the sum.

        :raises PayloadError: it is none.
        """
        part = wire.hear(wire.Part, payload)
        self.desk.up += len(payload)
        if held is None or not held.secure or self._server is None or held.phase == AGGREGATING:
            return
        if (part.run, part.round, part.epoch) != (self._run, held.number, held.secure["epoch"]):
            return
        if client not in held.asked:
            return
        try:
            if part.what not in _STEPS or not self._news(client, part, held, out):
                self._again(client, held, out)
        except SecureSumError as error:
            if error.reason in _PASSED_OVER:
                return
            if error.reason != "late":
                held.refused[client] = f"{error.reason}: {error}"
            held.waiting.discard(client)
            self._say(f"c/{client}/inbox", held, "out", f"{error.reason}: {error}"[:300].encode(), out)

    def _news(self, client: str, part: wire.Part, held: Round, out: Answer) -> bool:
        """Take a step; False: it has been taken before."""
        phase, form = _STEPS[part.what]
        order = list(_TIMES)
        if order.index(phase) > order.index(held.phase):
            raise SecureSumError("early", f"{part.what} in the phase {held.phase!r}")
        if unpack(part.body, form).client != client:
            raise SecureSumError("unknown", "a step in the name of somebody else")
        key = f"secure/{part.what}/{client}"
        if phase == AGREEING and held.phase != AGREEING:
            return False
        getattr(self._sum, part.what)(part.body)
        if phase != held.phase or key in self._stored:
            return False
        self._stored[key] = None
        out.commit[key] = part.body
        held.waiting.discard(client)
        return True

    # -- what is said -----------------------------------------------------------------------------------------------

    def _say(self, topic: str, held: Round, what: str, body: bytes, out: Answer) -> None:
        part = wire.Part(self._run, held.secure["epoch"], held.number, what, body)
        self.voice.say(out, topic, wire.say(part))

    def _again(self, client: str, held: Round, out: Answer) -> None:
        """Say to one client what it has to answer."""
        topic = f"c/{client}/inbox"
        if client not in self._missing(held):
            return
        match held.phase:
            case wire.SHARES:
                self._say(topic, held, "roster", self._sum.roster(), out)
            case "collecting":
                self._say(topic, held, "inbox", self._sum.inbox(client), out)
            case wire.AGREEING:
                self._say(topic, held, "survivors", self._sum.survivors(), out)
            case wire.UNMASKING:
                self._say(topic, held, "survivors", self._sum.survivors(), out)
                if self._sum.terms.agreed:
                    self._say(topic, held, "agreements", self._sum.agreements(), out)

    def call(self, held: Round, out: Answer) -> None:
        """Say what this phase begins with."""
        root = f"r/{held.number}"
        match held.phase:
            case wire.SHARES:
                self._say(f"{root}/roster", held, "roster", self._sum.roster(), out)
            case "collecting":
                for client in self._missing(held):
                    self._say(f"c/{client}/inbox", held, "inbox", self._sum.inbox(client), out)
            case wire.AGREEING:
                self._say(f"{root}/survivors", held, "survivors", self._sum.survivors(), out)
            case wire.UNMASKING:
                if not self._sum.terms.agreed:
                    self._say(f"{root}/survivors", held, "survivors", self._sum.survivors(), out)
                else:
                    self._say(f"{root}/agreements", held, "agreements", self._sum.agreements(), out)

    # -- from phase to phase ----------------------------------------------------------------------------------------

    def look(self, held: Round, now: int, out: Answer) -> str:
        """Whether a phase is over: ``wait``, ``next``, ``close`` (the masks can be taken off), or why the round is aborted."""
        late = now >= self._until
        if held.phase == UNMASKING:
            if self._sum.ready():
                return "close"
            return self._few(held) if late or self._hopeless(held) else "wait"
        came = self._came(held)
        if came < self._needed(held):
            return self._few(held) if late or self._hopeless(held) else "wait"
        if held.enough is None:
            held.enough = now
        if not (late or not held.waiting or now >= held.enough + ns(self.rules.grace)):
            return "wait"
        try:
            self._close(held, now)
        except SecureSumError:
            return self._few(held)
        return "next"

    def _close(self, held: Round, now: int) -> None:
        match held.phase:
            case wire.KEYS:
                self._sum.roster()
                self._enter(held, SHARES, now)
            case wire.SHARES:
                held.boxed = sorted(self._sum.inboxes())
                self._enter(held, COLLECTING, now)
            case "collecting":
                held.counted = sorted(pair for pair in self.desk.taken if pair[1] == held.number)
                for client, _ in held.counted:
                    self._sum.came(client)
                self._sum.survivors()
                self._enter(held, AGREEING if self._sum.terms.agreed else UNMASKING, now)
            case wire.AGREEING:
                self._sum.agreements()
                self._enter(held, UNMASKING, now)

    def _came(self, held: Round) -> int:
        """How many have done what this phase asks."""
        match held.phase:
            case wire.KEYS:
                return self._sum.count("keys")
            case "collecting":
                return sum(number == held.number for _, number in self.desk.taken)
            case wire.SHARES:
                return self._sum.count("shares")
            case wire.AGREEING:
                return self._sum.count("agreed")
        return self._sum.count("reveals")

    def _of(self, held: Round) -> int:
        """Of how many."""
        match held.phase:
            case wire.KEYS:
                return len(held.asked)
            case wire.SHARES:
                return self._sum.count("keys")
            case "collecting":
                return len(held.boxed)
        return len(held.counted)

    def _needed(self, held: Round) -> int:
        """Without how many nothing comes of the round."""
        if held.phase == KEYS:
            return self.quorum
        return max(self.quorum, self._sum.needed)

    def _hopeless(self, held: Round) -> bool:
        """Whether so many have said that they will not answer that there is nothing to wait for."""
        if held.phase == KEYS:
            return False  # others may come in their places
        if self._came(held) + len(held.waiting) >= self._needed(held):
            return False
        gone = sum(
            name in held.refused or (said := self.roster.members.get(name)) is None or said.skips == held.number
            for name in self._missing(held)
        )
        return self._of(held) - gone < self._needed(held)

    def _few(self, held: Round) -> str:
        """Why a round is aborted, in words."""
        came, of, needed = self._came(held), self._of(held), self._needed(held)
        if came >= needed:
            return (
                f"too few for a secure sum: {came} of {of} clients {_DID[held.phase]}, but of some too few neighbours"
            )
        return f"too few for a secure sum: {came} of {of} clients {_DID[held.phase]}, {needed} are needed"

    @property
    def keys(self) -> int:
        """How many have sent their keys."""
        return self._sum.count("keys")

    def wake(self, held: Round) -> list[int]:
        """When :meth:`look` may have something."""
        if held.phase == AGGREGATING:
            return []
        return [self._until] if held.enough is None else [self._until, held.enough + ns(self.rules.grace)]

    # -- the end ----------------------------------------------------------------------------------------------------

    def forget(self, out: Answer) -> None:
        """The round is over, whatever became of it."""
        out.commit.update(self._stored)
        self._stored, self._server = {}, None

    def merge(self, strategy: Strategy, model: Weights, held: Round, evaluate: Evaluate | None) -> partial[Merged]:
        """What makes the next model of the sum; to be called in a thread.

        It raises :class:`SecureSumError` where what was revealed gives a secret not back, or the sum is none.
        """
        taken = [self.desk.taken[pair] for pair in held.counted]
        equal = held.secure["most"] == 1
        return partial(_merge, self._sum, strategy, model, taken, self.desk, self.wanted, evaluate, held.size, equal)


def _merge(
    server: Server,
    strategy: Strategy,
    model: Weights,
    taken: Sequence[Taken],
    desk: Desk,
    wanted: tuple[Shape, ...],
    evaluate: Evaluate | None,
    places: int,
    equal: bool,
) -> Merged:
    values, samples, alive = server.total(_vectors(taken, desk))
    if not len(alive) <= samples <= len(alive) * server.terms.most:
        raise SecureSumError("garbled", f"the sum claims {samples} rows of {len(alive)} clients: one of them lies")
    count = len(alive) if equal else samples
    update = ClientUpdate("sum", mean_of(values / count, wanted), samples, clients=len(alive))
    return replace(made(strategy, model, [update], wanted, evaluate, places), samples=samples)


def _vectors(taken: Sequence[Taken], desk: Desk) -> Iterator[Array]:
    """The masked numbers, one update in memory at a time."""
    for update in taken:
        read = update if update.payload else desk.recall(update)
        yield read.packed[MASKED_NUMBERS]


def mean_of(vector: Array, wanted: tuple[Shape, ...]) -> Weights:
    """The arrays of one vector, as fine as it is (float64)."""
    out: Weights = {}
    at = 0
    for shape in wanted:
        out[shape.name] = vector[at : at + shape.size].reshape(shape.shape)
        at += shape.size
    return out
