"""A site: coordinator of the gateways below it, and one client of the job above; the same machines, put together.

The half below is a :class:`nodes.federated.told.Told`, the half above a :class:`nodes.federated.client.Client` whose trainer is
:class:`Rounds`. When the client would train, its work is held back; the coordinator gets the model that the call begins with,
and runs its rounds; then the work is let go, finds in the trainer what came of them, and makes an update of it as of any
training: compressed, with what was left out last time, weighted by samples. Topics of the job above begin with ``above/``, and
so do the keys of the half above: both halves are committed in one transaction.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from nodes.federated import wire
from nodes.federated.client import Client
from nodes.federated.local import Compressors, split_task
from nodes.federated.machine import Answer, Machine, Say, Work
from nodes.federated.rules import SECOND
from nodes.federated.told import DONE, Base, Task, Told, deadline, read_base
from nodes.federated.weights import Weights, fit, shapes
from nodes.trainers._trainer import Examples, Fit, Fitted, Trainer
from schemas.errors import ConfigError, PayloadError, PenstockError
from schemas.messages import Array

ABOVE = "above/"
LAST = 60 * SECOND
"""Time that the final model of the job above may take to come, in ns, once that job is over."""


WENT_ON = "the job above went on"


class SkippedError(PenstockError):
    """There will be no update of this site for a round of the job above."""


class Rounds(Trainer):
    """What the client half takes for a trainer: what it has learned is what the rounds below came to.

    :param model: of the form; its numbers are of no interest.
    """

    def __init__(self, model: Weights) -> None:
        self.result = self._model = model
        self.metrics: dict[str, float] = {}
        self.samples = 0

    def open(self) -> None:
        """Nothing is to be made."""

    def weights(self) -> Weights:
        return {name: array.copy() for name, array in self._model.items()}  # what is given away may be computed in

    def load(self, weights: Weights) -> None:
        fit(weights, shapes(self._model))
        self._model = weights

    def fit(self, examples: Examples, plan: Fit) -> Fitted:
        """:raises ConfigError: clients above correct their gradients, and a site has none of its own."""
        del examples
        if plan.correction:
            raise ConfigError("a site cannot correct the gradients of its clients for the job above")
        self._model = self.result
        return Fitted(round(self.metrics.get("steps", 0)), self.metrics.get("train_loss", float("nan")))

    def predict(self, x: Array) -> Array:
        raise NotImplementedError("a site has no examples")

    def evaluate(self, examples: Examples) -> dict[str, float]:
        """What the clients said of the model from above, each on its own examples."""
        del examples
        return {name.removeprefix("local_"): value for name, value in self.metrics.items() if name.startswith("local_")}

    def examples(self) -> Examples:
        """As many as the clients' rows together, and nothing in them."""
        import numpy as np

        return Examples(np.empty((self.samples, 0), np.float32), np.broadcast_to(np.int64(0), (self.samples,)))


class Site(Machine):
    """One site.

    :param below: with rules that :func:`nodes.federated.told.endless` made.
    :param above: makes the client half of its trainer, what it counts by and how many rows there are (``examples`` and ``count``
        of :class:`Client`).
    :param rounds: of the half below for each round of the job above.
    """

    def __init__(
        self, below: Told, above: Callable[[Trainer, Callable[[], Examples], Callable[[], int]], Client], rounds: int
    ) -> None:
        self.below, self.rounds = below, rounds
        self._part = Rounds(below.model)
        self.above = above(self._part, self._part.examples, below.samples)
        self._held: Work | None = None
        self._reading = False
        self._under_way = ""
        self._queue: deque[tuple[str, Work]] = deque()
        self._last: int | None = None

    @property
    def outcome(self) -> str:
        """Why the job is over; empty: it is not."""
        return self.below.outcome

    # -- the contract -----------------------------------------------------------------------------------------------

    def filters(self) -> tuple[str, ...]:
        return (*self.below.filters(), *(ABOVE + topic for topic in self.above.filters()))

    def will(self) -> Say:
        return _lifted(self.above.will())

    def start(self, kept: Mapping[str, Any], now: int) -> Answer:
        out = Answer()
        self._below(self.below.start(kept, now), out)
        self._above(self.above.start(Above(kept), now), out)
        return self._settled(out, now)

    def heard(self, topic: str, payload: bytes, now: int) -> Answer:
        out = Answer()
        if topic.startswith(ABOVE):
            self._heard_above(topic.removeprefix(ABOVE), payload, now, out)
        else:
            self._below(self.below.heard(topic, payload, now), out)
            if topic.endswith("/state"):
                self._above(self.above.fed(now), out)
        return self._settled(out, now)

    def worked(self, name: str, result: Any, now: int) -> Answer:
        out = Answer()
        whose, self._under_way = self._under_way, ""
        match whose:
            case "below":
                if self._dead:
                    result = SkippedError(WENT_ON)
                    self.below.stop(WENT_ON)
                self._below(self.below.worked(name, result, now), out)
            case "above":
                self._above(self.above.worked(name, result, now), out)
            case "final":
                self._finish(result if isinstance(result, Base) else None, now, out)
            case _:
                self._read(result, now, out)
        return self._settled(out, now)

    def linked(self, now: int) -> Answer:
        out = Answer()
        self._below(self.below.linked(now), out)
        return self._settled(out, now)

    def linked_above(self, now: int) -> Answer:
        """As :meth:`linked`, of the link to the job above."""
        out = Answer()
        self._above(self.above.linked(now), out)
        if self._last is not None:
            self.above.download.linked(now)
        return self._settled(out, now)

    def wake(self) -> int | None:
        if self.outcome:
            return None
        times = [self.below.wake(), self.above.wake()]
        if self._last is not None:
            times += [self._last, self.above.download.wake()]
        return min((time for time in times if time is not None), default=None)

    def tick(self, now: int) -> Answer:
        out = Answer()
        for due, tick, take in (
            (self.below.wake(), self.below.tick, self._below),
            (self.above.wake(), self.above.tick, self._above),
        ):
            if due is not None and due <= now:
                take(tick(now), out)
        return self._settled(out, now)

    # -- both halves' answers ---------------------------------------------------------------------------------------

    def _below(self, answer: Answer, out: Answer) -> None:
        out.commit.update(answer.commit)
        out.say += answer.say
        out.rows += answer.rows
        out.over = out.over or answer.over
        if answer.work is not None:
            self._queue.append(("below", answer.work))

    def _above(self, answer: Answer, out: Answer) -> None:
        out.commit.update({ABOVE + key: value for key, value in answer.commit.items()})
        out.say += [_lifted(say) for say in answer.say]
        if answer.work is not None and answer.work.name == "fit":
            self._held = answer.work
        elif answer.work is not None:
            self._queue.append(("above", answer.work))

    def _settled(self, out: Answer, now: int) -> Answer:
        """Everything that follows; one work at a time."""
        if not self.outcome:
            while self._go_on(now, out):
                pass
        if self._queue and not self._under_way and not out.over:
            self._under_way, out.work = self._queue.popleft()
        return out

    # -- what a round of the job above comes to ---------------------------------------------------------------------

    def _wanted(self, run: int, number: int) -> bool:
        """Whether an update for that round may still be of use; as long as nothing was heard: yes."""
        if self.above.outcome:
            return False
        if (call := self.above.call) is None:
            return True
        return call.run == run and call.phase == wire.COLLECTING and (call.open or call.round == number)

    @property
    def _dead(self) -> bool:
        """What the half below does is of no use."""
        task, call = self.below.task, self.above.busy
        if task is None:
            return False
        return not self._wanted(task.run, task.round) or (call is not None and not task.answers(call))

    def _go_on(self, now: int, out: Answer) -> bool:
        """Whether there was something to do."""
        below, above, call = self.below, self.above, self.above.busy
        if self._dead:
            if below.adding:
                return False  # until what adds it up is back
            self._below(below.drop(WENT_ON, now), out)
            return True
        if above.outcome:
            return self._end(now, out)
        if self._held is None or call is None or self._reading:
            return False
        if not self._wanted(call.run, call.round):
            self._give_up(WENT_ON, now, out)
            return True
        if (task := below.task) is None:
            return self._begin(call, now, out)
        if task.over == DONE:
            self._part.result, self._part.metrics, self._part.samples = below.model, task.metrics, task.counts()
            self._queue.append(("above", self._held))
            self._held = None
        elif task.over:
            self._give_up(f"{below.rules.job}: {task.over}", now, out)
            return True
        return False

    def _give_up(self, why: str, now: int, out: Answer) -> None:
        self._held = None
        self._above(self.above.worked("fit", SkippedError(why), now), out)

    def _begin(self, call: wire.Call, now: int, out: Answer) -> bool:
        """Read the model that the call begins with; the half below begins when it is there."""
        try:
            split_task(call.fit)
            if call.fit.get("control") is not None:
                raise ConfigError(f"a site cannot do {str(call.fit['control'])[:32]!r} for the job above")
        except ConfigError as error:
            self._give_up(str(error), now, out)
            return True
        if (data := self.above.download.data(call.base)) is None:
            self._give_up("the model is not there any more", now, out)
            return True
        self._reading = True
        act = partial(read_base, data, call.base, self.below.wanted, self.below.job.shared)
        self._queue.append(("read", Work("read", act)))
        return False

    def _read(self, result: Any, now: int, out: Answer) -> None:
        self._reading, call = False, self.above.busy
        if self._held is None or call is None or not self._wanted(call.run, call.round):
            return  # it is given up where everything is
        if not isinstance(result, Base):
            self._give_up(f"{type(result).__name__}: {result}", now, out)
            return
        plan = {**split_task(call.fit), "seed": int(call.fit.get("seed", 0))}
        end = deadline(call, self.below.own.deadline, self.rounds, now)
        task = Task(call.run, call.round, call.base, self.rounds, end, plan, call.evaluate)
        self._below(self.below.begin(task, result, now), out)

    # -- the end ----------------------------------------------------------------------------------------------------

    def _heard_above(self, topic: str, payload: bytes, now: int, out: Answer) -> None:
        if not self.above.outcome:
            self._above(self.above.heard(topic, payload, now), out)
            return
        try:  # the client half listens no more; what is still to come is the model
            if topic == "model":
                self.above.download.heard(wire.hear(wire.Manifest, payload), now)
            elif topic.startswith("blob/"):
                self.above.download.took(payload, now)
        except PayloadError:
            self.above.garbage += 1

    def _end(self, now: int, out: Answer) -> bool:
        """The job above is over: take its last model, tell everybody below, and be over too."""
        if self._reading:
            return False
        above, download = self.above, self.above.download
        self._last = now + LAST if self._last is None else self._last
        name = download.digest if above.call is None else above.call.base
        if (data := download.data(name)) is not None:
            self._reading = True
            act = partial(read_base, data, name, self.below.wanted, self.below.job.shared)
            self._queue.append(("final", Work("final", act)))
        elif now >= self._last:
            self._finish(None, now, out)
        elif (said := download.needs(now)) is not None:
            out.say.append(Say(f"{ABOVE}c/{above.name}/need", said))
        return False

    def _finish(self, base: Base | None, now: int, out: Answer) -> None:
        self._below(self.below.finish(self.above.outcome, base, now), out)


class Above(Mapping[str, Any]):
    """What was committed of the half above."""

    def __init__(self, kept: Mapping[str, Any]) -> None:
        self._kept = kept

    def __getitem__(self, key: str) -> Any:
        return self._kept[ABOVE + key]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(ABOVE) for key in self._kept if key.startswith(ABOVE))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def client(job: str, name: str, compressors: Compressors, **options: Any) -> Callable[..., Client]:
    """Makes the half above, for :class:`Site`."""

    def make(trainer: Trainer, examples: Callable[[], Examples], count: Callable[[], int]) -> Client:
        return Client(job, name, trainer, examples, count, compressors=compressors, sums=False, **options)

    return make


def _lifted(say: Say) -> Say:
    return Say(ABOVE + say.topic, say.payload, say.retain, say.expiry)
