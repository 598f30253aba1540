"""What the user of ``federate`` decides about secure sums, and what does not go together with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from nodes.federated import kinds
from nodes.federated.weights import Shape
from nodes.options import Options
from schemas.errors import Problem

if TYPE_CHECKING:
    from nodes.federate import Config
    from nodes.federated.rules import Secure

CLIP = 8.0
"""Where nothing says how large a number of an update may be: far above what training changes in a round, and a sum of 1,000
clients is still exact to 4e-6 of one of them."""
LEAST = 3


class SecureSums(Options):
    """The coordinator sees sums of updates only. ``secure: true`` stands for the defaults."""

    clip: float | None = Field(
        None, gt=0, le=1e9, description="largest absolute value of one number of an update; 8, or what privacy needs"
    )
    threshold: float = Field(
        2 / 3,
        ge=0.5,
        lt=1,
        description="more than this part of the clients that begin a round must end it; fewer learn nothing",
    )
    least: int = Field(LEAST, ge=LEAST, description="clients whose sum may be seen, at least")
    degree: int = Field(
        0, ge=0, description="neighbours of each client, even; 0: all others. Some 40 suffice for a thousand clients"
    )
    agreed: bool = Field(
        False,
        description="clients sign who is in the sum before they take masks off: against a coordinator that lies;"
        " needs keys on both sides",
    )

    @field_validator("degree")
    @classmethod
    def _even(cls, degree: int) -> int:
        if degree % 2 or degree == 2:
            raise ValueError("expected an even number from 4 on, or 0 for all others")
        return degree


def bare(value: Any) -> Any:
    """``secure: true``."""
    return {} if value is True else None if value is False else value


def bare_number(value: Any) -> Any:
    """``secure: true`` of a client."""
    return LEAST if value is True else None if value is False else value


def problems(config: Config) -> Iterator[Problem]:
    """What is asked for that cannot be had of sums alone."""
    secure = config.secure
    if secure is None:
        return
    strategy = kinds.strategy(config.strategy)
    if not strategy.sums or strategy.extras((Shape("w", (1,)),)):
        yield Problem(
            ("strategy",), f"{config.strategy.name} has to see each update; with 'secure' there is only their sum"
        )
    if config.compress is not None:
        yield Problem(
            ("compress",), "masked numbers are noise, and noise cannot be compressed: leave it out, or 'secure'"
        )
    if config.buffer is not None:
        yield Problem(("buffer",), "a secure sum needs its clients at one time, and with 'buffer' there are no rounds")
    if config.report:
        yield Problem(("report",), "what each client reports of its own would be seen: leave it out, or 'secure'")
    if config.pool is not None:
        said = "one client would be the coordinator's own, whose part of a sum it knows: leave it out, or 'secure'"
        yield Problem(("pool",), said, on_key=True)
    if config.limits.norm is not None:
        yield Problem(
            ("limits", "norm"), "no update is seen, so none can be measured; 'clip' of 'secure' bounds each number"
        )
    clients, least = config.clients, secure.least
    for name, number in (("least", clients.least), ("quorum", clients.quorum), ("most", clients.most)):
        if name in clients.model_fields_set and number is not None and number < least:
            yield Problem(("clients", name), f"{number} is less than the {least} clients that a secure sum needs")
    if secure.agreed and not (getattr(config, "key", None) and getattr(config, "devices", None)):
        said = "clients that agree need keys of their own and the coordinator's: this job has none"
        yield Problem(("secure", "agreed"), said)


def rules(config: Config) -> Secure | None:
    """As the coordinator takes it."""
    from nodes.federated.rules import Secure

    if (secure := config.secure) is None:
        return None
    clip, privacy = secure.clip, config.privacy
    if clip is None:
        clip = CLIP
        if (
            privacy is not None
        ):  # no number is larger than the whole; of a client's own noise hardly any is beyond 8 deviations
            noise = 0.0
            if privacy.where == "local":
                noise = getattr(config.chosen_strategy(), "noise", 0.0)
            clip = privacy.clip * (1 + 8 * noise)
    return Secure(
        clip=clip,
        threshold=secure.threshold,
        least=secure.least,
        degree=secure.degree,
        agreed=secure.agreed,
        equal=privacy is not None or getattr(config.strategy.options, "weigh", "samples") == "clients",
    )
