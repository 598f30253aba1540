"""The form of every message on the wire, as msgspec reads and writes it; :mod:`schemas.codec` makes messages of it and back.

Bodies that carry tensors have a form of their own here; all other bodies are their own wire form.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec

from schemas.messages import Aggregate, Dead, End, Event, Ledger, Model, Progress, Scalar, State

Int64: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""What a column of times can hold; msgpack's integers reach to 2**64 - 1."""


class Tensor(msgspec.Struct, frozen=True):
    """A numpy array on the wire: ``{"dtype": "<f4", "shape": [2, 3], "data": <bin>}``, C order, little endian."""

    dtype: str
    shape: list[int]
    data: memoryview


class ReadingsBody(msgspec.Struct, omit_defaults=True, kw_only=True):
    n: int
    columns: dict[str, Tensor | list[str | None]]
    time: Tensor | None = None
    source: list[str] | None = None


class FrameBody(msgspec.Struct, omit_defaults=True, kw_only=True):
    encoding: str
    layout: str
    data: Tensor | memoryview
    rate: float | None = None
    attributes: dict[str, Scalar] = {}


class TensorsBody(msgspec.Struct, omit_defaults=True, kw_only=True):
    tensors: dict[str, Tensor]
    attributes: dict[str, Scalar] = {}


class PredictionsBody(msgspec.Struct, omit_defaults=True, kw_only=True):
    model: Model
    seen: str
    labels: list[str]
    scores: Tensor
    boxes: Tensor | None = None
    values: dict[str, Tensor] | None = None
    times: dict[str, int] = {}
    attributes: dict[str, Scalar] = {}


class UpdateBody(msgspec.Struct, omit_defaults=True, kw_only=True):
    job: str
    round: int
    client: str
    base: str
    samples: int
    tensors: dict[str, Tensor]
    metrics: dict[str, float] = {}


class Envelope(msgspec.Struct, kw_only=True, tag_field="type", omit_defaults=True):
    """Keys of every message; ``type`` comes first.

    ``born`` is there where the source's read time is known. ``epoch`` and ``seq`` are there on ``safe`` edges: the
    producer's incarnation and the message's place on its port, for acknowledgement (:mod:`broker.window`).
    """

    id: str
    source: str
    time: Int64
    born: Int64 = 0
    epoch: int = 0
    seq: int = 0


class ReadingsMessage(Envelope, tag="readings/1"):
    body: ReadingsBody


class FrameMessage(Envelope, tag="frame/1"):
    body: FrameBody


class TensorsMessage(Envelope, tag="tensors/1"):
    body: TensorsBody


class PredictionsMessage(Envelope, tag="predictions/1"):
    body: PredictionsBody


class AggregateMessage(Envelope, tag="aggregate/1"):
    body: Aggregate


class EventMessage(Envelope, tag="event/1"):
    body: Event


class UpdateMessage(Envelope, tag="update/1"):
    body: UpdateBody


class StateMessage(Envelope, tag="state/1"):
    body: State


class LedgerMessage(Envelope, tag="ledger/1"):
    body: Ledger


class EndMessage(Envelope, tag="end/1"):
    body: End


class ProgressMessage(Envelope, tag="progress/1"):
    body: Progress


class DeadMessage(Envelope, tag="dead/1"):
    body: Dead


WireMessage: TypeAlias = (
    ReadingsMessage
    | FrameMessage
    | TensorsMessage
    | PredictionsMessage
    | AggregateMessage
    | EventMessage
    | UpdateMessage
    | StateMessage
    | LedgerMessage
    | EndMessage
    | ProgressMessage
    | DeadMessage
)


def json_schemas() -> dict[str, Any]:
    """JSON Schema of every wire message, by type; ``bin`` is shown as a base64 string."""
    members = WireMessage.__args__
    _, components = msgspec.json.schema_components(members, ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "oneOf": [{"$ref": f"#/$defs/{member.__name__}"} for member in members],
        "$defs": components,
    }
