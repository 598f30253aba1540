"""How right a model is where the answers are known: counts of known by answered classes, and what follows from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from nodes.models.labelled import Known
from nodes.operator import Emit, Operator
from schemas.errors import RunError
from schemas.messages import Message, Predictions

if TYPE_CHECKING:
    from nodes.inference import Infer

PART = 64
"""Examples that go through at once."""


@dataclass
class Report:
    """What came of it.

    :param counts: (known label, answered label) → examples; an answered "" stands for none.
    :param wrong: ids of wrongly answered examples, the first few.
    :param refused: reason → examples that the model could not take.
    :param answers: id → answer.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    answers: dict[str, str] = field(default_factory=dict)

    @property
    def examples(self) -> int:
        """All that were shown, refused ones too."""
        return sum(self.counts.values()) + sum(self.refused.values())

    @property
    def right(self) -> int:
        """Rightly answered."""
        return sum(n for (known, said), n in self.counts.items() if known == said)

    @property
    def accuracy(self) -> float:
        """Part of all examples that was answered rightly; a refused one was not."""
        return self.right / self.examples if self.examples else 0.0

    def labels(self, order: Sequence[str] = ()) -> list[str]:
        """Every label that is known or was answered, those of ``order`` first."""
        seen = {label for pair in self.counts for label in pair if label}
        return [label for label in order if label in seen] + sorted(seen - set(order))

    def recall(self, label: str) -> float:
        """Part of the examples of a class that was answered so; NaN if there are none."""
        return _part(self.counts[label, label], sum(n for (known, _), n in self.counts.items() if known == label))

    def precision(self, label: str) -> float:
        """Part of the answers of a class that was right; NaN if there are none."""
        return _part(self.counts[label, label], sum(n for (_, said), n in self.counts.items() if said == label))

    def agreement(self, other: Report) -> float:
        """Part of the examples that both answer alike."""
        both = self.answers.keys() | other.answers.keys()
        return _part(sum(self.answers.get(i) == other.answers.get(i) for i in both), len(both))


def _part(some: int, whole: int) -> float:
    return some / whole if whole else float("nan")


def evaluate(known: Iterable[Known], before: Sequence[Operator], model: Infer) -> Report:
    """Show the examples to a model, through the operators before it.

    :param before: preprocessing, already open; ``model`` too.
    :raises RunError: the runtime fails, or the model's answers have no labels.
    """
    report = Report()
    source = iter(known)
    while part := list(islice(source, PART)):
        labels = {one.message.id: one.label for one in part}
        emit = Emit()
        messages = prepared([one.message for one in part], [*before, model], emit)
        report.refused.update(f"{reason}: {detail}" for _, reason, detail in emit.dead)
        for message in messages:
            body = message.body
            if not isinstance(body, Predictions):
                continue
            if body.labels is None:
                raise RunError("the model's answers have no labels: evaluate takes models that classify")
            said = body.labels[0] if body.labels else ""
            if (label := labels.get(body.seen)) is None:
                raise RunError(
                    "a step before the model makes other messages of the examples: their answers are not known"
                )
            report.counts[label, said] += 1
            report.answers[body.seen] = said
            if said != label and len(report.wrong) < PART:
                report.wrong.append(body.seen.partition(":")[2])
    return report


def prepared(messages: list[Message], operators: Sequence[Operator], emit: Emit) -> list[Message]:
    """Messages through operators, one after the other; what one of them refuses is rejected to ``emit``."""
    for operator in operators:
        if not messages:
            break
        own = Emit()
        operator.process(messages, "examples.out", own)
        for message, reason, detail in own.dead:
            emit.reject(message, reason, detail)
        messages = own.messages()
    return messages


@contextmanager
def opened(operators: Sequence[Operator]) -> Iterator[None]:
    """Open all of them, and close them at the end."""
    done: list[Operator] = []
    try:
        for operator in operators:
            operator.open()
            done.append(operator)
        yield
    finally:
        for operator in reversed(done):
            operator.close()
