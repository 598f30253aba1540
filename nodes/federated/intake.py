"""What is looked at before an update counts. Everything in it was written by somebody else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

from nodes.compressors._compressor import Compressor
from nodes.federated.rules import Limits
from nodes.federated.weights import Shape, UnfitError, Weights, fit, norm
from nodes.federated.wire import finite, identity, same_form, unpack_update
from nodes.strategies._strategy import ClientUpdate
from schemas.errors import PayloadError, PenstockError
from schemas.messages import Array


class RefusedError(PenstockError):
    """This update does not count.

    :param reason: a short stable word: those of :class:`PayloadError` and :class:`UnfitError`, and ``job``, ``client``,
        ``base``, ``samples``, ``norm``, ``extra``, ``not-asked``, ``unknown-client``, ``future``, ``unsigned``, ``unsealed``,
        ``signature``, ``sealed``.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Form:
    """What an update has to be.

    :param wanted: the model's form; ``extras``: of what the strategy wants beside the delta.
    :param compressor: what undoes the clients' compression.
    """

    wanted: tuple[Shape, ...]
    extras: tuple[Shape, ...]
    compressor: Compressor | None


@dataclass(frozen=True, slots=True)
class Taken:
    """An update as it arrived, read and not yet unpacked: its arrays are views on ``payload``.

    :param round: the one that it answers.
    :param base: digest of the model that it began with.
    :param payload: empty: it was put on the shelf (:meth:`shelved`).
    """

    client: str
    round: int
    base: str
    samples: int
    payload: bytes
    packed: Weights
    extra: Weights
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Under which it is committed."""
        return f"update/{self.round}/{self.client}"

    def shelved(self) -> Taken:
        """The same without its arrays; they are where it was committed."""
        return replace(self, payload=b"", packed={}, extra={})

    def delta(self, compressor: Compressor | None, wanted: tuple[Shape, ...]) -> Weights:
        """The delta that it brings, unpacked; whether it fits is not looked at.

        :raises UnfitError: it cannot be unpacked.
        """
        if compressor is None:
            delta, names = self.packed, [shape.name for shape in wanted]
            if delta.keys() == set(names):  # a map of another language has its own order
                delta = {name: delta[name] for name in names}
        else:
            delta = compressor.unpack(self.packed, wanted)
        return delta


def read(payload: bytes, client: str, job: str, run: int) -> Taken:
    """An update of that client's to that job, whatever is in it.

    :raises RefusedError: it is none.
    """
    try:
        ident, update, extra = unpack_update(payload)
    except PayloadError as error:
        raise RefusedError(error.reason, error.detail) from None
    if update.client != client:
        raise RefusedError("client", f"{client} sent an update of {update.client[:64]!r}")
    if update.job != job:
        raise RefusedError("job", f"an update of job {update.job[:64]!r}")
    if ident != identity(client, run, update.round):
        raise RefusedError("job", f"an update of another run: {ident[:128]!r}")
    return Taken(
        client, update.round, update.base, update.samples, payload, update.tensors, extra, finite(update.metrics)
    )


def examine(update: Taken, base: str, form: Form, limits: Limits, largest: float) -> None:
    """Look whether an update may be added up.

    :param base: digest of the model that it has to begin with.
    :param largest: what the norm may be where the limits say nothing.
    :raises RefusedError: it may not.
    """
    if update.base != base:
        raise RefusedError("base", f"it began with model {update.base[:16]!r}, the round with {base[:16]}")
    if not 1 <= update.samples <= limits.samples:
        raise RefusedError("samples", f"it claims {update.samples} rows, at most {limits.samples} are believed")
    try:
        delta = update.delta(form.compressor, form.wanted)
        fit(delta, form.wanted)
    except (UnfitError, PayloadError) as error:
        raise RefusedError(error.reason, str(error)) from None
    if not same_form(update.extra, form.extras):
        raise RefusedError("extra", "its further arrays are not those that the strategy wants, or not finite")
    most = largest if limits.norm is None else limits.norm
    if not (size := norm(delta)) <= most:
        raise RefusedError("norm", f"the norm of its delta is {size:.3g}, at most {most:.3g}")


Recall: TypeAlias = Callable[[Taken], Taken]
"""Reads a shelved update again."""


class Shelf:
    """Updates that are read again when their arrays are looked at, one at a time: not all of a round are in memory at once."""

    def __init__(self, recall: Recall, compressor: Compressor | None, wanted: tuple[Shape, ...]) -> None:
        self._recall, self._compressor, self._wanted = recall, compressor, wanted
        self._held: tuple[Taken, Weights, Weights] | None = None

    def delta(self, update: Taken) -> Weights:
        """The delta of a shelved update."""
        return self._read(update)[1]

    def extra(self, update: Taken) -> Weights:
        """Its further arrays."""
        return self._read(update)[2]

    def _read(self, update: Taken) -> tuple[Taken, Weights, Weights]:
        if self._held is None or self._held[0] is not update:
            self._held = None  # before the next is read
            read = self._recall(update)
            self._held = update, read.delta(self._compressor, self._wanted), read.extra
        return self._held


class Arrays(Mapping[str, Array]):
    """Arrays that are somewhere else until they are looked at."""

    def __init__(self, names: tuple[str, ...], get: Callable[[], Weights]) -> None:
        self._names, self._get = names, get

    def __getitem__(self, name: str) -> Array:
        return self._get()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def client_updates(
    taken: Sequence[tuple[Taken, int]], form: Form, recall: Recall, *, one_by_one: bool
) -> list[ClientUpdate]:
    """The updates as strategies take them. They were examined.

    :param taken: with their staleness.
    :param one_by_one: the strategy looks at each once, so shelved ones may stay where they are until then.
    """
    shelf = Shelf(recall, form.compressor, form.wanted)
    names = tuple(shape.name for shape in form.wanted)
    out = []
    for update, staleness in taken:
        delta: Any
        extra: Any
        if update.payload or not one_by_one:
            read = update if update.payload else recall(update)
            delta, extra = read.delta(form.compressor, form.wanted), read.extra
        else:
            delta = Arrays(names, partial(shelf.delta, update))
            extra = Arrays(tuple(shape.name for shape in form.extras), partial(shelf.extra, update))
        out.append(ClientUpdate(update.client, delta, update.samples, extra, update.metrics, staleness))
    return out
