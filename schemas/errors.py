"""The errors of Penstock, named by what went wrong; each class owns the exit code of the command that ends with it.

Exit codes are part of the command line's contract:

====  ==========================================================================
code  meaning
====  ==========================================================================
0     done
1     a fault of Penstock itself or of a node while running (:class:`RunError`)
2     what the user wrote is wrong (:class:`ConfigError`); nothing was started
3     something that is needed is missing: an extra, a program, a file (:class:`MissingError`)
4     a broker or another far end cannot be reached or refuses us (:class:`BusError`)
5     the run ended but its ledger does not balance (:class:`UnbalancedError`)
====  ==========================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class PenstockError(Exception):
    """Base of every error that Penstock raises on purpose."""

    exit_code: ClassVar[int] = 1


class RunError(PenstockError):
    """A node failed while running."""


class UnbalancedError(RunError):
    """The ledger of a finished run does not balance."""

    exit_code = 5


class MissingError(PenstockError):
    """Something that the topology names is not installed or not there.

    :param what: what is missing, for example ``"PyAV"``.
    :param extra: the extra of the ``penstock`` distribution that brings it, if one does.
    """

    exit_code = 3

    def __init__(self, what: str, *, extra: str | None = None) -> None:
        hint = f"; install it with: pip install 'penstock[{extra}]'" if extra else ""
        super().__init__(f"{what} is not installed{hint}")
        self.what = what
        self.extra = extra


class UnableError(PenstockError):
    """A node process said that something it needs is missing; it says what, so this only carries the words."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in what the user wrote.

    :param path: keys from the root of the document to the value, e.g. ``("nodes", "camera", "from")``.
    :param message: what is wrong and what was expected, one line without a final stop.
    :param offset: for text values, characters from the value's start to the fault (expressions).
    :param on_key: the position meant is the key's, not the value's (an unknown key).
    """

    path: tuple[str | int, ...]
    message: str
    offset: int = 0
    on_key: bool = False


class ConfigError(PenstockError):
    """What the user wrote is wrong. Carries every problem found, each with its place in the document.

    Raised by kinds' ``check``, by the expression compiler and by the topology loader. Inner code gives paths relative
    to its own config; :meth:`under` prefixes them on the way out.
    """

    exit_code = 2

    def __init__(self, *problems: Problem | str) -> None:
        self.problems: tuple[Problem, ...] = tuple(p if isinstance(p, Problem) else Problem((), p) for p in problems)
        super().__init__("; ".join(p.message for p in self.problems))

    def under(self, *path: str | int) -> ConfigError:
        """The same problems, seen from ``path`` further up in the document."""
        return ConfigError(*(Problem((*path, *p.path), p.message, p.offset, p.on_key) for p in self.problems))


class PayloadError(PenstockError):
    """Received bytes are not a message of ours. The runtime dead-letters them with ``reason``.

    :param reason: a short stable word, counted in the ledger: ``not-msgpack``, ``unknown-type``, ``bad-body``,
        ``bad-tensor``, ``too-big``.
    :param detail: what exactly, for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class BusError(PenstockError):
    """Base of what goes wrong on the way to, in, or from a broker."""

    exit_code = 4


class ConnectError(BusError):
    """The broker cannot be reached or refused the connection. ``permanent`` refusals are not retried.

    :param code: MQTT 5 CONNACK reason code, where the broker gave one.
    """

    def __init__(self, message: str, *, code: int | None = None, permanent: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.permanent = permanent


class ClosedError(BusError):
    """The bus or subscription was closed by us; nothing more will come."""


class DisconnectedError(BusError):
    """The connection was lost and what was asked cannot be carried over to the next one (a QoS 0 publish, an ack)."""


class DeniedError(BusError):
    """The broker refused one request: a publish (PUBACK/PUBREC reason) or a subscription (SUBACK reason).

    :param topic: topic or filter that was refused.
    :param code: MQTT 5 reason code, 135 for *not authorized*.
    """

    def __init__(self, topic: str, code: int, reason: str) -> None:
        super().__init__(f"{topic}: refused by the broker: {reason} ({code})")
        self.topic = topic
        self.code = code
        self.reason = reason


class PacketTooLargeError(BusError):
    """A publication is larger than the broker's maximum packet size. It was not sent."""

    def __init__(self, topic: str, size: int, limit: int) -> None:
        super().__init__(f"{topic}: packet of {size} bytes, the broker takes at most {limit}")
        self.topic = topic
        self.size = size
        self.limit = limit


class PublishFailedError(BusError):
    """Some publications of one ``publish`` call failed; the others were acknowledged.

    :param failures: (index into the call's sequence, error) of each that failed.
    """

    def __init__(self, failures: Sequence[tuple[int, BusError]]) -> None:
        super().__init__("; ".join(str(error) for _, error in failures[:3]))
        self.failures = tuple(failures)


class SinkAwayError(PenstockError):
    """A sink's far end is away or busy; the runtime retries the same messages.

    :param retry_after: seconds to wait as asked by the far end; None leaves it to the runtime's backoff.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RejectedError(PenstockError):
    """A sink refuses these messages for good; the runtime dead-letters them and goes on with the others.

    :param rejected: (index into the written sequence, reason) of each refused message. All others are written.
    """

    def __init__(self, rejected: Sequence[tuple[int, str]]) -> None:
        super().__init__(rejected[0][1] if rejected else "rejected")
        self.rejected = tuple(rejected)


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of ``known``, or what there is to choose from, or ``""``."""
    from difflib import get_close_matches  # seldom needed, and every process has this module

    choices = sorted(known)
    if near := get_close_matches(wrong, choices, n=1, cutoff=0.6):
        return f"; did you mean {near[0]!r}?"
    if 0 < len(choices) <= 12:
        return f"; known: {', '.join(choices)}"
    return ""
