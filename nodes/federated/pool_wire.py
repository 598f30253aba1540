"""What gateways and the trainer of a pool say to each other: plain msgpack maps with a ``type``. ``docs/federated-pool.md``.

A batch is examples, sealed by the device to the trainer; the seal binds it to the job, the client, the consent under which it
was given and its number, so it counts as nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np

from nodes.federated import wire
from nodes.federated.examples import Example
from schemas.codec import from_tensor, to_tensor
from schemas.errors import PayloadError
from schemas.messages import Array
from schemas.wire import Tensor

if TYPE_CHECKING:
    from nodes.privacy.keys import Signer

TAKEN, REFUSED, WITHDRAWN = "taken", "refused", "withdrawn"
"""Answers. ``taken``: the batch is on the trainer's disk. ``withdrawn``: all that was given before is forgotten there."""
MOST = 4 * 2**20
"""Bytes of a batch, at most."""
ROWS = 100_000
"""Examples of a batch, at most."""


class Opened(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="fl-pool/1"):
    """``pool``, retained: there is somebody who takes batches.

    :param seal: the public key (X25519) to which they are sealed; empty: they come as they are.
    :param closed: nobody takes any more: the job is over.
    """

    job: str
    seal: bytes = b""
    closed: bool = False


class Batch(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="fl-batch/1", gc=False):
    """``p/<client>/up``, or the bytes of a blob.

    :param life: of the consent under which it is given: ns since the epoch when that began.
    :param number: from 1 on; a repeat has the same.
    :param sealed: ``data`` is a box of :func:`nodes.privacy.sealing.seal_for`; otherwise the bytes of :class:`Given`.
    """

    job: str
    life: int
    number: int
    data: bytes
    sealed: bool = False


class Given(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="fl-examples/1", gc=False):
    """Examples: ``x`` [n, *shape], ``y`` [n] int64 classes or float64 numbers, the identity and time (ns) of each."""

    x: Tensor
    y: Tensor
    ids: list[str]
    times: list[int]


class Answer(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="fl-given/1"):
    """``p/<client>/ack``: what became of a batch, or of a withdrawal (its ``life`` is ``until``)."""

    life: int
    number: int
    status: str
    reason: str = ""
    detail: str = ""


class Withdrawal(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="fl-withdrawal/1"):
    """``p/<client>/withdraw``: forget what was given under consents that began up to ``until``, ns since the epoch."""

    job: str
    until: int


_encode = msgspec.msgpack.Encoder().encode
_DECODERS: dict[type, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in (Opened, Batch, Given, Answer, Withdrawal)
}
T = TypeVar("T", Opened, Batch, Given, Answer, Withdrawal)


def say(message: Opened | Batch | Given | Answer | Withdrawal) -> bytes:
    """The message as it travels."""
    return _encode(message)


def hear(kind: type[T], payload: bytes | memoryview) -> T:
    """A message of that kind.

    :raises PayloadError: it is none.
    """
    heard: T = wire.decoded(_DECODERS[kind], payload)
    return heard


def sign(signer: Signer | None, job: str, topic: str, payload: bytes) -> bytes:
    """As it travels on that topic of the job: with a signature, where there is somebody who signs."""
    return payload if signer is None else wire.say(wire.Signed(signer.sign(f"{job}/{topic}", payload), payload))


def about(job: str, client: str, life: int, number: int) -> bytes:
    """What a box is bound to."""
    return _encode(["fl-batch", job, client, life, number])


@dataclass(frozen=True, slots=True)
class Bundle:
    """The examples of a batch, all of one dtype and shape."""

    number: int
    examples: Sequence[Example]

    def pack(self) -> bytes:
        """The bytes of a :class:`Given`."""
        rows = self.examples
        real = isinstance(rows[0].y, float)
        y = np.array([row.y for row in rows], "<f8" if real else "<i8")
        x = np.stack([row.x for row in rows])
        return say(Given(to_tensor(x), to_tensor(y), [row.id for row in rows], [row.time for row in rows]))


def unpack(data: bytes, client: str, *, numbers: bool) -> list[Example]:
    """Examples that a client gave; their identities begin with ``<client>/``. Everything in them was written by somebody else.

    :param numbers: labels are numbers, not classes.
    :raises PayloadError: they are none.
    """
    given = hear(Given, data)
    x: Array = from_tensor(given.x)
    y: Array = from_tensor(given.y)
    n = len(given.ids)
    if not (0 < n <= ROWS and x.ndim >= 2 and len(x) == n and y.shape == (n,) and len(given.times) == n and x.size):
        raise PayloadError("bad-body", f"{n} identities, inputs {list(x.shape)}, labels {list(y.shape)}")
    if x.dtype.kind not in "biuf" or y.dtype.str != ("<f8" if numbers else "<i8"):
        raise PayloadError("bad-body", f"inputs are {x.dtype}, labels {y.dtype}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise PayloadError("not-finite", "numbers that are infinite or none")
    if not numbers and int(y.min()) < 0:
        raise PayloadError("bad-body", f"a class {int(y.min())}")
    if max(map(len, given.ids)) > 512 or not all(0 <= time < 2**63 for time in given.times):
        raise PayloadError("bad-body", "identities that are too long, or times that are none")
    labels = y.tolist()
    return [
        Example(f"{client}/{ident}", time, row, label)
        for ident, time, row, label in zip(given.ids, given.times, x, labels, strict=True)
    ]
