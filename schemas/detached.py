"""Messages whose big tensors travel apart from them: in memory that both ends share, while the rest goes by the bus.

:func:`take_out` finds what is worth it, :func:`leave` joins the rest to the place of what was taken out, :func:`encode` writes
one or more of these, and :func:`decode` puts the two together again as views, without a copy. On the wire it is an array,
where every other message is a map, so one is never taken for the other. This is between nodes of one machine; nobody else
sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from schemas import codec
from schemas.errors import PayloadError
from schemas.messages import Frame, Message, Tensors
from schemas.wire import FrameBody, FrameMessage, Tensor, TensorsBody, TensorsMessage

_NONE: Final = memoryview(b"")


class Place(msgspec.Struct, array_like=True, frozen=True):
    """Where a slot of shared memory is.

    :param process: id of the process that writes the memory, and ``descriptor``: its file there.
    :param mark: what the memory must have in it, so that no other is taken for it.
    :param generation: what the slot must hold still.
    """

    process: int
    descriptor: int
    mark: bytes
    slot: int
    generation: int


class Detached(msgspec.Struct, array_like=True, frozen=True):
    """A message of which parts are elsewhere.

    :param parts: (name of the tensor; for a frame empty, where it begins in the slot, bytes).
    :param message: the message with these parts empty.
    """

    place: Place
    parts: list[tuple[str, int, int]]
    message: FrameMessage | TensorsMessage


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Detached])
_ARRAYS: Final = frozenset((*range(0x90, 0xA0), 0xDC, 0xDD))
"""First bytes of MessagePack's arrays."""


def is_detached(payload: bytes | memoryview) -> bool:
    """Whether a payload is messages of which parts are elsewhere."""
    return len(payload) > 0 and payload[0] in _ARRAYS


def take_out(message: Message, least: int) -> tuple[FrameMessage | TensorsMessage, dict[str, memoryview]] | None:
    """The message in its wire form without what is big in it, and that; None if nothing is.

    :param least: bytes from which a tensor (or a frame's encoded picture) is big.
    :raises TypeError: a tensor of a dtype that does not travel.
    """
    body = message.body
    if isinstance(body, Frame):
        data = body.data
        if (data.nbytes if hasattr(data, "nbytes") else len(data)) < least:
            return None
        if isinstance(data, bytes | bytearray | memoryview):
            rest: Tensor | memoryview = _NONE
            whole = memoryview(data)
        else:
            tensor = codec.to_tensor(data)
            whole, rest = tensor.data, Tensor(tensor.dtype, tensor.shape, _NONE)
        frame = FrameBody(
            encoding=body.encoding, layout=body.layout, data=rest, rate=body.rate, attributes=body.attributes
        )
        return FrameMessage(id=message.id, source=message.source, time=message.time, born=message.born, body=frame), {
            "": whole
        }
    if isinstance(body, Tensors) and any(array.nbytes >= least for array in body.tensors.values()):
        tensors = {name: codec.to_tensor(array) for name, array in body.tensors.items()}
        big = {name: tensor.data for name, tensor in tensors.items() if tensor.data.nbytes >= least}
        for name in big:
            tensors[name] = Tensor(tensors[name].dtype, tensors[name].shape, _NONE)
        return TensorsMessage(
            id=message.id,
            source=message.source,
            time=message.time,
            born=message.born,
            body=TensorsBody(tensors=tensors, attributes=body.attributes),
        ), big
    return None


def leave(
    wire: FrameMessage | TensorsMessage,
    place: Place,
    parts: list[tuple[str, int, int]],
    *,
    epoch: int = 0,
    seq: int = 0,
) -> Detached:
    """What is left of a message; ``epoch`` and ``seq`` as in :func:`schemas.codec.encode`."""
    wire.epoch, wire.seq = epoch, seq
    return Detached(place, parts, wire)


def encode(messages: Sequence[Detached]) -> bytes:
    """What travels instead of these messages."""
    return _encoder.encode(messages)


def read(payload: bytes | memoryview) -> list[Detached]:
    """What :func:`encode` wrote.

    :raises PayloadError: it is something else.
    """
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise PayloadError("bad-body", str(error)[:200]) from None


def decode(detached: Detached, memory: Any, *, trace: str | None = None) -> tuple[Message, int, int]:
    """The message with its parts as views on ``memory``, with epoch and sequence number.

    :param memory: the slot's bytes; anything with a buffer. The views keep it alive.
    :raises PayloadError: the two do not go together.
    """
    view = memoryview(memory)
    wire = detached.message
    body: FrameBody | TensorsBody = wire.body
    for name, at, size in detached.parts:
        if at < 0 or size < 0 or at + size > view.nbytes:
            raise PayloadError("bad-body", "a part lies outside of its slot")
        data = view[at : at + size]
        if isinstance(body, FrameBody):
            rest = body.data
            body.data = Tensor(rest.dtype, rest.shape, data) if isinstance(rest, Tensor) else data
        elif (tensor := body.tensors.get(name)) is not None:
            body.tensors[name] = Tensor(tensor.dtype, tensor.shape, data)
        else:
            raise PayloadError("bad-body", "a part of a tensor that is not there")
    return codec.received(wire, trace)
