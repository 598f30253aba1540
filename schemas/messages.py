"""Messages as operators see them: an envelope and one typed body, arrays as numpy.

These are the in-memory forms. :mod:`schemas.codec` turns them into the wire's plain msgpack and back. A message is never
changed after it was made (two nodes of one process may hold the same object), arrays inside it are read-only by
convention: make a new message with :meth:`Message.derive`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, TypeAlias

import msgspec
import numpy as np

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
"""``NDArray[Any]``, in words that load nothing."""
Column: TypeAlias = "Array | list[str | None]"
"""One field over all rows: a 1-d array (float, int or bool; NaN is missing) or a list of texts (None is missing)."""
Scalar: TypeAlias = bool | int | float | str | None


@cache
def no_scores() -> Array:
    """float32 [0]: what is answered where there is no class."""
    return np.zeros(0, "<f4")


class Readings(msgspec.Struct, frozen=True, kw_only=True):
    """``readings/1``: n rows of sensor values as columns.

    :param n: number of rows, ≥ 0.
    :param columns: field name → column of length n.
    :param time: event time per row, int64 ns since the Unix epoch, UTC; None: every row has the envelope's time.
    :param source: device per row; None: every row speaks of the envelope's source.
    """

    n: int
    columns: dict[str, Column]
    time: Array | None = None
    source: list[str] | None = None


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """``frame/1``: one image, sound chunk or signal window.

    :param encoding: ``raw`` (``data`` is an array), ``jpeg`` or ``png`` (``data`` is the file's bytes).
    :param layout: axes of the raw array: ``HWC``, ``HW``, ``CHW``, ``T`` (samples), ``TC``, ``TF`` (spectrogram).
    :param rate: frames or samples per second; None where it has none.
    :param attributes: what else is known of it, e.g. ``{"label": "7", "path": "a.png"}``.
    """

    data: Array | bytes | memoryview
    encoding: str = "raw"
    layout: str = "HWC"
    rate: float | None = None
    attributes: dict[str, Scalar] = {}


class Tensors(msgspec.Struct, frozen=True, kw_only=True):
    """``tensors/1``: named arrays: features, or the activations between the parts of a split model."""

    tensors: dict[str, Array]
    attributes: dict[str, Scalar] = {}


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """Which model answered: its name, version and the sha256 of its file (hex)."""

    name: str
    version: str
    digest: str


class Predictions(msgspec.Struct, frozen=True, kw_only=True):
    """``predictions/1``: what a model says of one frame, tensor or row.

    :param labels: one per answer, best first: the top classes, or the class of each box. Empty for regression and raw.
    :param scores: float32 [k], one per label, in [0, 1].
    :param boxes: float32 [k, 4] in pixels of the input frame, x0 y0 x1 y1; None where the model finds no boxes.
    :param values: named outputs of regression or raw decoders; None otherwise.
    :param seen: id of the message that was inferred on.
    :param times: stage → ns since the Unix epoch, e.g. ``{"ingest": …, "infer": …}``.
    :param attributes: carried over from what was seen (a known label travels here).
    """

    model: Model
    seen: str
    labels: list[str] = []
    scores: Array = msgspec.field(default_factory=no_scores)
    boxes: Array | None = None
    values: dict[str, Array] | None = None
    times: dict[str, int] = {}
    attributes: dict[str, Scalar] = {}


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """Half-open interval of event time [start, end), ns since the Unix epoch."""

    start: int
    end: int


class Aggregate(msgspec.Struct, frozen=True, kw_only=True):
    """``aggregate/1``: the statistics of one key in one window.

    :param key: the value(s) grouped by, joined by ``/``; ``""`` without grouping.
    :param count: rows that went in.
    :param revision: 0 for the first answer; a late row makes a new answer for the same window with a higher one.
    """

    window: Window
    key: str
    values: dict[str, Scalar]
    count: int
    revision: int = 0


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """``event/1``: something happened.

    :param name: what, e.g. ``anomaly``.
    :param severity: ``info``, ``warning`` or ``alarm``.
    """

    name: str
    severity: str = "info"
    text: str = ""
    values: dict[str, Scalar] = {}


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """``update/1``: a federated client's answer to one round.

    :param base: digest of the model that it was trained from, or its first 16 digits or more.
    :param samples: rows trained on, the weight of this update.
    """

    job: str
    round: int
    client: str
    base: str
    samples: int
    tensors: dict[str, Array]
    metrics: dict[str, float] = {}


class State(msgspec.Struct, frozen=True, kw_only=True):
    """``state/1``: life of a node; retained on ``<topology>/<node>/state``; the will says ``offline``.

    :param status: ``starting``, ``ready``, ``ended``, ``failed`` or ``offline``.
    """

    node: str
    status: str
    host: str = ""
    pid: int = 0
    detail: str = ""


class Flow(msgspec.Struct, frozen=True, kw_only=True):
    """What passed one edge or port, in messages and in rows (a frame, a prediction, an event is one row)."""

    messages: int = 0
    rows: int = 0


class Spooled(msgspec.Struct, frozen=True, kw_only=True):
    """What a relay that keeps did with one port. taken = given + dropped (all reasons) + dead + held.

    :param readers: nodes beyond that it is given to, as one stream.
    :param taken: received from the producer, first deliveries only.
    :param given: every reader is done with it.
    :param dropped: by reason: ``spool-full``, ``damaged`` (the disk did not give it back).
    :param dead: larger than the far broker takes.
    :param held: in the spool, on its way to the readers included.
    :param disk: bytes of the spool's files.
    """

    readers: list[str]
    taken: Flow
    given: Flow
    dropped: dict[str, Flow] = {}
    dead: Flow = Flow()
    held: Flow = Flow()
    disk: int = 0


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """``ledger/1``: the books of one node. In rows: received = passed + filtered + dropped + dead + held.

    :param received: by in-edge (``<producer>.<port>``), first deliveries only.
    :param repeated: by in-edge: deliveries recognised as repeats and not processed again (messages).
    :param emitted: by out-port.
    :param passed: rows whose effect is complete: emitted on, absorbed into an aggregate, or written by a sink.
    :param filtered: rows an operator chose to leave out.
    :param dropped: rows lost on purpose, by reason (``queue-full``, ``late``, ``deadline``).
    :param dead: rows or undecodable messages sent to dead letters, by reason.
    :param held: rows taken in whose effect is not complete: queued, in open windows, waiting for an acknowledgement.
    :param moved: by consumer with replicas: messages that one took over from another, which may have had them too; unset
        where there were none.
    :param latency: by stage, percentiles in ns: ``{"wait": {"p50": …, "p99": …}, "process": …, "since-source": …}``.
    :param spooled: of a relay that keeps, and only of one: by in-edge, which is also the name of its out-port.
    """

    node: str
    received: dict[str, Flow] = {}
    repeated: dict[str, int] = {}
    emitted: dict[str, Flow] = {}
    passed: int = 0
    filtered: int = 0
    dropped: dict[str, int] = {}
    dead: dict[str, int] = {}
    held: int = 0
    latency: dict[str, dict[str, int]] = {}
    moved: dict[str, int] | msgspec.UnsetType = msgspec.UNSET
    spooled: dict[str, Spooled] | msgspec.UnsetType = msgspec.UNSET


class End(msgspec.Struct, frozen=True, kw_only=True):
    """``end/1``: the producer's stream on this port is complete; ``messages`` were sent on it in all."""

    messages: int


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """``progress/1``: the stream has come to this event time, though it had nothing to bring. Between nodes with replicas.

    :param time: ns since the Unix epoch.
    """

    time: int


class Dead(msgspec.Struct, frozen=True, kw_only=True):
    """``dead/1``: a dead letter on ``<topology>/<node>/dead``: the original bytes and why they were refused.

    :param reason: short stable word, as counted in the ledger.
    :param edge: in-edge it came by, ``""`` for a source.
    :param position: where it came from: topic, file and line, offset.
    """

    node: str
    reason: str
    detail: str
    edge: str = ""
    position: str = ""
    payload: bytes = b""


Body: TypeAlias = (
    Readings | Frame | Tensors | Predictions | Aggregate | Event | Update | State | Ledger | End | Progress | Dead
)

TYPE_OF: dict[type, str] = {
    Readings: "readings/1",
    Frame: "frame/1",
    Tensors: "tensors/1",
    Predictions: "predictions/1",
    Aggregate: "aggregate/1",
    Event: "event/1",
    Update: "update/1",
    State: "state/1",
    Ledger: "ledger/1",
    End: "end/1",
    Progress: "progress/1",
    Dead: "dead/1",
}


class Message(msgspec.Struct, frozen=True, gc=False):
    """Envelope and body.

    :param id: identity: equal for a repeat, new for a new message; unique on its topic. Made at the source as
        ``<node>:<stream>:<number>`` and kept by every node that answers one to one, so that one id names a thing
        from sensor to sink; see :meth:`derive`.
    :param source: device or camera that it speaks of; messages of one source keep their order.
    :param time: event time of the first row, ns since the Unix epoch, UTC.
    :param trace: W3C ``traceparent``, where tracing is on. Travels as an MQTT user property, not in the payload.
    :param born: when the source read it, ns since the epoch; 0: not known. Kept by :meth:`derive`; latency from source to
        here is measured with it.
    """

    id: str
    source: str
    time: int
    body: Body
    trace: str | None = None
    born: int = 0

    def derive(self, body: Body, *, part: int | None = None, time: int | None = None) -> Message:
        """A new message that follows from this one: same source, same id (``id/part`` for the one of several)."""
        ident = self.id if part is None else f"{self.id}/{part}"
        return Message(ident, self.source, self.time if time is None else time, body, self.trace, self.born)

    @property
    def type(self) -> str:
        """The wire's ``type``, e.g. ``readings/1``."""
        return TYPE_OF[type(self.body)]

    @property
    def rows(self) -> int:
        """How many rows the ledger counts for it."""
        body = self.body
        return body.n if isinstance(body, Readings) else 1


def rows_of(messages: Iterable[Message]) -> int:
    """How many rows the ledger counts for them together."""
    return sum([message.body.n if type(message.body) is Readings else 1 for message in messages])


def tensor_bytes(body: Body) -> int:
    """Bytes of a frame's picture or of tensors; 0 for bodies that have neither."""
    if isinstance(body, Frame):
        return len(body.data) if isinstance(body.data, bytes) else body.data.nbytes
    return sum(array.nbytes for array in body.tensors.values()) if isinstance(body, Tensors) else 0
