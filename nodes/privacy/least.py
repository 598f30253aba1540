"""What a client insists on, whatever it is asked: its own noise, and a budget of its own that it counts on its own disk.

A call that asks for less is not answered. So a coordinator that lies, or was written wrong, gets nothing that this device did not
agree to. The budget is the device's for this job: it outlives the runs of the job and the client's restarts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from nodes.options import Options


class Insists(Options):
    """What is the least. Only noise that the client adds itself (``where: local``) is worth anything to it."""

    clip: float | None = Field(
        None, gt=0, description="largest clip that is accepted, i.e. length of an update; any, if left out"
    )
    noise: float | None = Field(
        None, gt=0, le=1e6, description="least noise of one's own that is accepted, in parts of clip; any, if left out"
    )
    epsilon: float | None = Field(
        None, gt=0, le=1000, description="budget: what all updates of this client together may cost (extra privacy)"
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="chance with which epsilon may not hold")
    rounds: int | None = Field(None, ge=1, description="most updates that this client ever makes for the job")

    @model_validator(mode="after")
    def _means_something(self) -> Insists:
        if self.noise is None and self.epsilon is None and self.rounds is None:
            raise ValueError("say noise, epsilon or rounds")
        return self

    def too_little(self, private: Mapping[str, Any]) -> str:
        """Why a call that asks for this privacy is not answered; empty: it asks for enough."""
        if private.get("where") != "local":
            return "it asks for an update without noise"
        try:
            clip, noise = float(private["clip"]), float(private["noise"])
        except (KeyError, TypeError, ValueError):
            return "it does not say how much noise"
        if not (0 < clip < math.inf and 0 < noise < math.inf):
            return f"it asks for noise of {noise:g} times {clip:g}"
        if self.noise is not None and noise < self.noise:
            return f"it asks for noise of {noise:g}, the least is {self.noise:g}"
        if self.clip is not None and clip > self.clip:
            return f"it asks for a clip of {clip:g}, the most is {self.clip:g}"
        return ""


class Least:
    """One client's, with what it has spent.

    :raises MissingError: there is a budget, and dp-accounting is not installed.
    """

    def __init__(self, insists: Insists) -> None:
        from nodes.privacy.accountant import Accountant

        self._insists = insists
        self._spent: dict[float, int] = {}
        self._budget = None if insists.epsilon is None else Accountant(insists.delta, insists.epsilon, local=True)

    def begin(self, kept: Mapping[str, Any]) -> None:
        """Go on with what was committed."""
        self._spent = dict(kept.get("spent", ()))
        if self._budget is not None:
            self._budget.restore([[noise, 1.0, count] for noise, count in self._spent.items()])

    @property
    def rounds(self) -> int:
        """Updates made so far."""
        return sum(self._spent.values())

    def why_not(self, private: Mapping[str, Any], fit: Mapping[str, Any]) -> str:
        """Why a call is not answered; empty: it may be.

        :param private: of the call; ``fit``: its plan.
        """
        if why := self._insists.too_little(private):
            return f"privacy: {why}"
        if fit.get("control") is not None:
            return "privacy: it asks for arrays beside the update, which have no noise"
        if self._insists.rounds is not None and self.rounds >= self._insists.rounds:
            return f"privacy: all {self._insists.rounds} updates are made"
        if self._budget is not None and not self._budget.allows(float(private["noise"])):
            return f"privacy: the budget is spent, epsilon {self._budget.cost():.3g} of {self._insists.epsilon:g}"
        return ""

    def spend(self, private: Mapping[str, Any], commit: dict[str, Any]) -> None:
        """An update was made; to be committed with it, before it is said.

        :raises BudgetError: the budget does not allow it; nothing was counted.
        """
        noise = float(private["noise"])
        if self._budget is not None:
            self._budget.spend(noise)
        self._spent[noise] = self._spent.get(noise, 0) + 1
        commit["spent"] = [[each, count] for each, count in self._spent.items()]
