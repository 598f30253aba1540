"""The client session's link without a network: a transport that goes nowhere, and bytes handed to the link as one would."""

from __future__ import annotations

from broker.session_link import Link


class Wire:
    """The transport's side, as far as a link asks for it."""

    def get_extra_info(self, name: str) -> None: ...

    def set_write_buffer_limits(self, high: int) -> None: ...

    def write(self, data: bytes) -> None: ...

    def pause_reading(self) -> None: ...

    resume_reading = close = abort = pause_reading


def feed(link: Link, data: bytes) -> None:
    """Bytes have arrived."""
    while data:
        room = link.get_buffer(-1)
        count = min(len(room), len(data))
        room[:count] = data[:count]
        link.buffer_updated(count)
        data = data[count:]
