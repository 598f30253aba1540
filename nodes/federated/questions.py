"""What `ask` asks and `answer` answers, as people write it, and as rows when it is answered."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from nodes.federated.analytics import MOST, Question, counted, quantile
from nodes.options import Options

Weigh = Literal["rows", "clients"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Bins(_Part):
    """Bins of the same width."""

    low: float = Field(description="edge of the first")
    high: float = Field(description="edge of the last")
    bins: int = Field(ge=1, lt=MOST - 1, description="how many between them")

    @model_validator(mode="after")
    def _ordered(self) -> Bins:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError("low and high are finite, and low is less")
        if any(a >= b for a, b in pairwise(self.edges)):
            raise ValueError("bins: they are narrower than numbers can tell apart")
        return self

    @property
    def edges(self) -> tuple[float, ...]:
        return tuple(np.linspace(self.low, self.high, self.bins + 1).tolist())


class Asked(_Part):
    """One question."""

    field: str | None = Field(None, min_length=1, description="column of the rows; the question's name if left out")
    categories: list[str | int] = Field(
        [], description="values that are counted, each; all others together are the last count"
    )
    edges: list[float] | Bins | None = Field(
        None, description="of bins, increasing, for numbers; or {low, high, bins}: so many of the same width"
    )
    quantiles: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [], max_length=100, description="told beside the counts, each to within its bin: 0.5 is the median"
    )

    @model_validator(mode="after")
    def _asks(self) -> Asked:
        if self.quantiles and self.edges is None:
            raise ValueError("quantiles: they are of numbers, so there must be edges")
        self.question("x", "rows")
        return self

    def question(self, name: str, weigh: Weigh) -> Question:
        """As :mod:`nodes.federated.analytics` takes it."""
        edges = self.edges.edges if isinstance(self.edges, Bins) else tuple(self.edges or ())
        return Question(self.field or name, tuple(self.categories), edges, weigh)


def _bare(value: Any) -> Any:
    """``state: [idle, run]`` for ``state: {categories: [idle, run]}``."""
    return {"categories": value} if isinstance(value, list) else value


class Questions(Options):
    """What is counted; both sides of a job have the same."""

    questions: dict[str, Annotated[Asked, BeforeValidator(_bare, json_schema_input_type=Asked | list[str | int])]] = (
        Field(
            min_length=1,
            max_length=100,
            description="name → what is counted: {categories: […]} (or the bare list) or {edges: …}; equal on both sides",
        )
    )
    weigh: Weigh = Field(
        "rows",
        description="what counts. rows: each row 1; clients: each client's counts are divided by their sum, so that all"
        " clients count the same; equal on both sides",
    )

    @field_validator("questions")
    @classmethod
    def _named(cls, questions: dict[str, Asked]) -> dict[str, Asked]:
        for name in questions:
            if not 1 <= len(name) <= 64 or "/" in name:
                raise ValueError(f"{name[:70]!r} is no name of a question: 1 to 64 characters, and no /")
        return questions

    def all(self) -> dict[str, Question]:
        """By the names of the update's arrays: the question's, and eight hex digits of what it asks. So two sides that do not
        ask the same have models of another form, and do not come together."""
        asked = {name: each.question(name, self.weigh) for name, each in self.questions.items()}
        return {array_of(name, question): question for name, question in asked.items()}


def array_of(name: str, question: Question) -> str:
    """The name of a question's array."""
    said = msgspec.msgpack.encode(question)
    return f"{name}/{hashlib.sha256(said).hexdigest()[:8]}"


class Found(NamedTuple):
    """One row of an answer.

    :param kind: ``count`` or ``quantile``; ``what``: of which category or bin, or ``p95``.
    :param low: lower edge of a bin, ``high``: upper one; NaN where there is none.
    """

    question: str
    kind: str
    what: str
    low: float
    high: float
    value: float


def found(questions: Questions, answers: Mapping[str, list[float]]) -> Iterator[Found]:
    """The rows of a round's sums; ``answers`` as :meth:`nodes.strategies._strategy.Strategy.answers` has them."""
    for name, asked in questions.questions.items():
        question = asked.question(name, questions.weigh)
        if (sums := answers.get(array_of(name, question))) is None:
            continue  # of an older question of the same name
        summed = np.array(sums)
        none = (math.nan,) * (1 if question.edges else question.size)
        lows, highs = (*none, *question.edges), (*question.edges, *none)
        for (what, value), low, high in zip(counted(question, summed), lows, highs, strict=True):
            yield Found(name, "count", what, low, high, value)
        for share in asked.quantiles:
            yield Found(name, "quantile", f"p{100 * share:g}", math.nan, math.nan, quantile(question, summed, share))
