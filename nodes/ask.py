"""Ask a fleet: how many of each, histograms, quantiles over the rows of all gateways, of which only sums are seen.

``{ask: {job: fleet, questions: {state: [idle, run, fault]}, every: 10min}}``: the job's ``answer`` nodes, wherever they run,
count the rows that they have; their counts are added up, with noise if wished, and the sums come out as rows, so they are in a
database or on a dashboard like any other readings. It is a federated job: a round is an answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from nodes import federate, log
from nodes.answer import counting
from nodes.choice import Chosen
from nodes.federate import SECOND, Clients
from nodes.federated.options import MemberOptions
from nodes.federated.questions import Questions
from nodes.operator import Context, Draft, Flow, Source
from nodes.privacy.dp import Privacy
from schemas.errors import ConfigError, Problem
from schemas.units import Duration

if TYPE_CHECKING:
    from nodes.federated.questions import Found
    from schemas.messages import Column

TEXTS = ("job", "question", "kind", "what")
REAL = ("low", "high", "value", "epsilon")
WHOLE = ("round", "clients")
FIELDS = frozenset({*TEXTS, *REAL, *WHOLE})
"""Columns of an answer."""


class Config(Questions, MemberOptions):
    """Options of ``ask``."""

    every: Duration = Field(
        60 * SECOND, gt=0, description="an answer at each multiple of it since 1970 (1h: at each full hour, UTC)"
    )
    rounds: int = Field(1_000_000, ge=1, le=1_000_000, description="answers; then the job is over")
    clients: Clients = Field(Clients.model_validate({}), description="how many gateways there must be")
    deadline: Duration = Field(60 * SECOND, gt=0, description="for one answer; at it, it is given of what is there")
    grace: Duration = Field(2 * SECOND, description="what is waited for the others once there is a quorum")
    gather: Duration = Field(
        0, description="what is waited for more gateways before the first answer, when the least are here"
    )
    wait: Duration = Field(
        30 * 86_400 * SECOND, gt=0, description="for gateways, while nothing can be asked; then the job ends"
    )
    retries: int = Field(1000, ge=0, description="times in a row that it is asked in vain, after which the job ends")
    most: int = Field(
        1_000_000_000,
        ge=1,
        description="rows that one gateway may count; an answer with more is refused and kept to be looked at",
    )
    privacy: Privacy | None = Field(
        None,
        description="differential privacy of whole gateways: clip is the most that one may count for (the length of its vector of"
        " counts); none if left out",
    )

    @property
    def trainer(self) -> Chosen:
        """What counts."""
        return counting(self)

    def check(self, context: Context) -> None:
        super().check(context)
        if self.privacy is not None and self.privacy.noise is None and "rounds" not in self.model_fields_set:
            said = "without 'noise' it is found for the number of answers: say 'rounds', or 'noise'"
            raise ConfigError(Problem(("privacy",), said, on_key=True))

    def leading(self) -> federate.Config:
        """The same as a job that learns."""
        from nodes.federate import Limits
        from nodes.strategies import sum as adding

        strategy = Chosen("strategy", "sum", adding.Config(), bare=True, inner=None)
        longest = math.sqrt(len(self.questions)) * (1 + 1e-9) if self.weigh == "clients" else float(self.most)
        if self.privacy is not None and self.privacy.where == "local":
            longest = math.inf  # it is clipped, and the noise has no bound
        limits = Limits.model_construct(norm=longest, samples=1)
        return self.carried(federate.Config, trainer=self.trainer, strategy=strategy, limits=limits)

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        del inputs, context
        return {"out": Flow("readings/1", FIELDS)}

    def accepts(self) -> frozenset[str]:
        return frozenset()

    def whole(self) -> str:
        return "one asks in a job"


def build(config: Config, context: Context) -> Source:
    """An :class:`AskSource`."""
    return AskSource(config, context)


class AskSource(federate.FederateSource):
    """Carries the coordinator of a job that counts."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config.leading(), context)
        self._asks = config

    def _drafts(self, row: dict[str, Any]) -> list[Draft]:
        """A round's answer as readings: a row for each count and quantile. None of a round that came to nothing."""
        from nodes.federated.questions import found

        if row["status"] != "committed":
            return []
        rows = list(found(self._asks, row.get("answers", {})))
        return [Draft(self._asks.job, int(row["time"]), self._readings(row, rows), str(row["round"]))] if rows else []

    def _readings(self, row: dict[str, Any], rows: Sequence[Found]) -> Any:
        import numpy as np

        from schemas.messages import Readings

        columns: dict[str, Column] = {"job": [self._asks.job] * len(rows)}
        columns |= {name: [getattr(each, name) for each in rows] for name in TEXTS[1:]}
        columns |= {name: np.array([getattr(each, name) for each in rows], np.float64) for name in REAL[:-1]}
        columns["epsilon"] = np.full(len(rows), row.get("epsilon", math.nan), np.float64)
        columns |= {name: np.full(len(rows), row.get(name, 0), np.int64) for name in WHOLE}
        return Readings(n=len(rows), columns=columns)

    def _tell(self, row: dict[str, Any]) -> None:
        said = {"node": self._context.node, "round": row["round"], "clients": row["clients"]}
        if row["status"] == "committed":
            log.info("answered", **said, refused=row["refused"])
        else:
            log.warning("not answered", **said, why=row["why"])
