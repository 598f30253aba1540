"""What the two sides of a federated job say to each other: plain msgpack maps, each with its ``type``.

An update is ``update/1`` (:mod:`schemas.codec`): its id is ``<client>:<run>:<round>``, its tensors are what the compressor made
of the delta, or the delta itself; the strategy's further arrays have ``extra/`` before their names. What arrives was written by
others: whoever decodes here gets the message or a :class:`PayloadError`, whatever the bytes are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import numpy as np

from nodes.federated.cohort import Crowd
from nodes.federated.weights import Shape, Weights
from schemas.codec import decode, encode, from_tensor, to_tensor
from schemas.errors import PayloadError
from schemas.messages import Array, Message, Update
from schemas.wire import Tensor

INLINE = 60_000
"""A model or update of up to so many bytes travels in its message, a larger one as a blob."""
CHUNK = 64 * 1024
"""Bytes of a blob's chunk, where the bus takes that much."""

BASE = 16
"""Hex digits of the base's digest that an update names: 64 bits tell a job's models apart, and 48 bytes less are an eighth of a
small update."""

EXTRA = "extra/"
"""Stands before the names of an update's further arrays; no model's array may have such a name."""

IDLE, COLLECTING, OVER = "idle", "collecting", "over"
"""Phases as clients see them. The others (aggregating, committed, aborted) are nobody's business but the coordinator's."""

KEYS, SHARES, MASKED, AGREEING, UNMASKING = "keys", "shares", "masked", "agreeing", "unmasking"
"""Phases of a round with a secure sum. ``masked`` stands where others are collecting: who does not know secure sums must not
take it for that, and send an update that anybody can read."""

MASKED_NUMBERS = "masked"
"""The one array of an update to a secure sum."""

TAKEN, STALE, REFUSED = "taken", "stale", "refused"
"""Answers to an update. ``taken``: it is on the coordinator's disk. ``stale``: too late, nobody's fault."""


class Presence(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="fl-client/1"):
    """``c/<client>/state``, retained, and the will of a client.

    :param here: False: gone.
    :param form: of the model that it trains, :func:`form`; a client with another one is not asked.
    :param samples: rows that it could train on now; with 0 it is not asked.
    :param pace: seconds that its last training took; 0: none yet.
    :param skips: number of the round that it will not answer, ``why`` says why.
    """

    here: bool
    form: str = ""
    samples: int = 0
    pace: float = 0.0
    skips: int = 0
    why: str = ""


class Call(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="fl-round/1", gc=False):
    """``round``, retained: what is asked of whom.

    :param run: one life of a job, from its first model on; a coordinator that lost its disk begins another.
    :param epoch: of the coordinator: grows at each of its starts. A client follows the highest that it saw.
    :param round: number of this round; each is used once, also by a round that was aborted.
    :param base: digest of the model to begin with (:func:`nodes.federated.weights.digest`).
    :param deadline: ns since the epoch, by the coordinator's clock; 0 where nothing is collected.
    :param cohort: clients that are asked; empty with ``open``: all. Of many ``crowd`` says who they are.
    :param open: asynchronous: train whenever a newer model is there, late updates are welcome.
    :param fit: fields of :class:`nodes.trainers._trainer.Fit`, with what the strategy adds; its ``seed`` is the job's.
    :param compress: what the clients' compressor is made of; None: none.
    :param evaluate: report metrics of the model received on own data.
    :param secure: terms of the round's secure sum (:class:`nodes.privacy.secure_sum.Terms`) but job and round; empty: none.
    :param private: what is done to an update before it leaves, and that nothing else is told; empty: nothing.
    :param aborted: the last rounds that came to nothing: updates for them were not used.
    :param why: with phase ``over``: what ended the job.
    :param seal: the coordinator's public key (X25519) to which clients that have a key seal their updates; empty: they do not.
    """

    job: str
    run: int
    epoch: int
    round: int
    phase: str
    base: str
    deadline: int = 0
    quorum: int = 0
    cohort: tuple[str, ...] = ()
    crowd: Crowd | None = None
    open: bool = False
    fit: dict[str, Any] = {}
    compress: Any = None
    evaluate: bool = False
    secure: dict[str, Any] = {}
    private: dict[str, Any] = {}
    aborted: tuple[int, ...] = ()
    why: str = ""
    seal: bytes = b""

    def asks(self, client: str) -> bool:
        """Whether that client is asked."""
        return self.open or client in self.cohort or (self.crowd is not None and client in self.crowd)

    @property
    def asked(self) -> int:
        """How many are; 0 with ``open``."""
        return len(self.cohort) + (0 if self.crowd is None else len(self.crowd))


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="fl-model/1", gc=False):
    """``model``, retained: the model as it is now.

    :param round: number of the round that made it; 0: the one that the job began with.
    :param version: rounds committed before it.
    :param digest: of the weights.
    :param blob: sha256 (hex) of the bytes of :func:`pack_model`.
    :param size: of those bytes.
    :param chunk: bytes of one chunk; 0: the model is in ``data``.
    """

    job: str
    run: int
    epoch: int
    round: int
    version: int
    digest: str
    blob: str
    size: int
    shapes: tuple[Shape, ...]
    chunk: int = 0
    data: bytes = b""
    metrics: dict[str, float] = {}


class Ack(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="fl-ack/1"):
    """``c/<client>/ack``: what became of the update for that round.

    :param status: ``taken``, ``stale`` or ``refused``.
    :param reason: a short stable word with ``refused``; ``detail`` is for a person.
    """

    run: int
    epoch: int
    round: int
    status: str
    reason: str = ""
    detail: str = ""


class Ask(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="fl-ask/1"):
    """``c/<client>/ask``: a client asks for what it has not heard.

    :param model: digest of the model whose manifest it lacks; empty: none.
    :param answer: number of the round whose :class:`Ack` it lacks; 0: none.
    """

    model: str = ""
    answer: int = 0


class Parcel(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="fl-parcel/1"):
    """``c/<client>/offer``: an update too large for one message comes as a blob (:mod:`broker.blobs`): its chunks on
    ``c/<client>/blob``, what the coordinator has of it on ``c/<client>/have``.

    :param digest: sha256 (hex) of the bytes of the ``update/1``, ``size`` how many, ``chunk`` of one chunk.
    """

    run: int
    round: int
    digest: str
    size: int
    chunk: int


class Signed(msgspec.Struct, frozen=True, tag_field="type", tag="fl-signed/1", gc=False):
    """Any other message, and who said it on which topic of which job: :mod:`nodes.federated.identity`. ``type`` comes first.

    :param signature: Ed25519, 64 bytes, of the message for the purpose ``<job>/<topic>`` (:func:`nodes.privacy.keys.verify`).
    """

    signature: bytes
    message: bytes


class Sealed(msgspec.Struct, frozen=True, tag_field="type", tag="fl-sealed/1", gc=False):
    """An ``update/1`` that only the coordinator can read (:func:`nodes.privacy.sealing.seal_for`). ``type`` comes first.

    :param by: the device's public key (Ed25519); who knows the device's key from elsewhere does not look at it.
    """

    run: int
    round: int
    by: bytes
    box: bytes


class Part(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="fl-part/1"):
    """One step of a secure sum. Of a client, on ``c/<client>/part``: ``key``, ``share``, ``agree``, ``reveal``, or ``ask`` for
    what is due. Of the coordinator, on ``r/<round>/<what>`` for all or on ``c/<client>/inbox``: ``roster``, ``inbox``,
    ``survivors``, ``agreements``, or ``out``, with the reason.

    :param epoch: of the terms: tells two attempts at one round apart.
    :param body: what the parties of the sum say to each other (:mod:`nodes.privacy.secure_terms`).
    """

    run: int
    epoch: int
    round: int
    what: str
    body: bytes = b""


class ModelBody(msgspec.Struct):
    """The bytes of a model: its arrays, and those that the strategy shares with the clients."""

    weights: dict[str, Tensor]
    shared: dict[str, Tensor] = {}


_encoder = msgspec.msgpack.Encoder()
_DECODERS: dict[type, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind)
    for kind in (Presence, Call, Manifest, Ack, Ask, Parcel, Part, Signed, Sealed, ModelBody)
}
M = TypeVar("M")
T = TypeVar("T", Presence, Call, Manifest, Ack, Ask, Parcel, Part, Signed, Sealed, ModelBody)


def say(message: Presence | Call | Manifest | Ack | Ask | Parcel | Part | Signed | Sealed) -> bytes:
    """The message as it travels."""
    return _encoder.encode(message)


def hear(kind: type[T], payload: bytes | memoryview) -> T:
    """A message of that kind.

    :raises PayloadError: it is none.
    """
    heard: T = decoded(_DECODERS[kind], payload)
    return heard


def decoded(decoder: msgspec.msgpack.Decoder[M], payload: bytes | memoryview) -> M:
    """What a decoder makes of what others sent.

    :raises PayloadError: nothing.
    """
    try:
        return decoder.decode(payload)
    except msgspec.ValidationError as error:
        raise PayloadError("bad-body", str(error)[:300]) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise PayloadError("not-msgpack", str(error)[:200]) from None


def signed(payload: bytes | memoryview) -> Signed | None:
    """The message as it was signed; None: it is none that was."""
    return _wrapped(Signed, b"fl-signed/1", payload)


def sealed(payload: bytes | memoryview) -> Sealed | None:
    """The update as it was sealed; None: it is none that was."""
    return _wrapped(Sealed, b"fl-sealed/1", payload)


def _wrapped(kind: type[T], tag: bytes, payload: bytes | memoryview) -> T | None:
    head = payload[:24]
    if tag not in (
        head if isinstance(head, bytes) else bytes(head)
    ):  # most are not wrapped, and need not be read twice
        return None
    try:
        return hear(kind, payload)
    except PayloadError:
        return None


# -- arrays ---------------------------------------------------------------------------------------------------------


def plain(weights: Mapping[str, Array]) -> dict[str, Any]:
    """Arrays as plain msgpack values: ``{"dtype", "shape", "data"}`` maps, for what is committed."""
    return {
        name: {"dtype": t.dtype, "shape": t.shape, "data": bytes(t.data)}
        for name, t in ((name, to_tensor(array)) for name, array in weights.items())
    }


def arrays(kept: Mapping[str, Any]) -> Weights:
    """Arrays from :func:`plain`, read-only.

    :raises PayloadError: they are none.
    """
    return {
        name: from_tensor(Tensor(value["dtype"], list(value["shape"]), memoryview(value["data"])))
        for name, value in kept.items()
    }


def pack_model(weights: Mapping[str, Array], shared: Mapping[str, Array]) -> bytes:
    """The bytes of a model, the same for the same numbers."""
    return _encoder.encode(
        ModelBody({k: to_tensor(v) for k, v in weights.items()}, {k: to_tensor(v) for k, v in shared.items()})
    )


def unpack_model(data: bytes | memoryview, wanted: tuple[Shape, ...]) -> tuple[Weights, Weights]:
    """The weights, in the order of ``wanted`` (msgpack's maps have none that counts), and the shared arrays; read-only views.

    :raises PayloadError: they are none.
    """
    body = hear(ModelBody, data)
    names = [shape.name for shape in wanted]
    if len(names) != len(body.weights) or not all(name in body.weights for name in names):
        raise PayloadError("bad-body", "the model's arrays are not those of its manifest")
    return {name: from_tensor(body.weights[name]) for name in names}, {
        name: from_tensor(tensor) for name, tensor in body.shared.items()
    }


def form(wanted: tuple[Shape, ...]) -> str:
    """16 hex digits that tell models apart by their arrays' names, shapes and dtypes."""
    return hashlib.sha256(_encoder.encode(wanted)).hexdigest()[:16]


# -- updates --------------------------------------------------------------------------------------------------------


def identity(client: str, run: int, number: int) -> str:
    """The id of an update's message; a repeat has the same."""
    return f"{client}:{run}:{number}"


def pack_update(
    job: str,
    run: int,
    number: int,
    client: str,
    *,
    base: str,
    samples: int,
    packed: Weights,
    extra: Weights,
    metrics: dict[str, float],
    time: int,
) -> bytes:
    """The bytes of an ``update/1``.

    :param base: digest of the model; its first :data:`BASE` digits travel.
    :param packed: the delta's arrays, or what a compressor made of them.
    """
    tensors = {**packed, **{EXTRA + name: array for name, array in extra.items()}}
    short = {
        name: int(value) if value.is_integer() else value for name, value in metrics.items()
    }  # msgpack's ints are small
    body = Update(
        job=job, round=number, client=client, base=base[:BASE], samples=samples, tensors=tensors, metrics=short
    )
    return encode(Message(identity(client, run, number), client, time, body))


def unpack_update(payload: bytes | memoryview) -> tuple[str, Update, Weights]:
    """The id, the update with the delta's arrays only, and the extra arrays; all views on ``payload``.

    :raises PayloadError: it is no ``update/1``.
    """
    message = decode(payload)
    body = message.body
    if not isinstance(body, Update):
        raise PayloadError("bad-body", f"expected update/1, got {message.type}")
    extra = {name[len(EXTRA) :]: array for name, array in body.tensors.items() if name.startswith(EXTRA)}
    if extra:
        rest = {name: array for name, array in body.tensors.items() if not name.startswith(EXTRA)}
        body = msgspec.structs.replace(body, tensors=rest)
    return message.id, body, extra


def room(wanted: tuple[Shape, ...]) -> int:
    """Bytes that a model with what is shared, or an update with what goes beside it, may have; nobody needs half of it."""
    return 1_000_000 + 4 * sum(shape.size * np.dtype(shape.dtype).itemsize for shape in wanted)


def seed_of(seed: int, number: int, client: str) -> int:
    """The seed of one client in one round, of the job's seed: 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}:{client}".encode()).digest()[:8], "big") >> 1


def finite(metrics: Mapping[str, float], most: int = 16) -> dict[str, float]:
    """The numbers among metrics that others sent: at most so many, names of at most 32 characters."""
    kept = [(name, float(value)) for name, value in metrics.items() if len(name) <= 32 and math.isfinite(value)]
    return dict(kept[:most])


def same_form(weights: Mapping[str, Array], wanted: tuple[Shape, ...]) -> bool:
    """Whether extra arrays are those wanted, in any order, and finite."""
    return all(
        shape.name in weights
        and weights[shape.name].shape == shape.shape
        and weights[shape.name].dtype.str == shape.dtype
        and bool(np.isfinite(weights[shape.name]).all())
        for shape in wanted
    ) and len(weights) == len(wanted)
