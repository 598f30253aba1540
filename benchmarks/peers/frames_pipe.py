"""The limit of frames by a broker: bare sockets, and nothing done with a frame.

``python -m benchmarks.peers.frames_pipe camera|mean HOST PORT``. The generator writes finished PUBLISH packets; the
collector reads into one buffer, and looks at nothing but lengths.
"""

from __future__ import annotations

import socket
import struct
import sys
import time

from benchmarks.peers.frames_common import SIZE, frames

_CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x00\x00\x00"
_TOPIC = b"\x00\x0dframes/camera"
_LENGTH = len(_TOPIC) + 8 + SIZE
_HEAD = bytes((0x30, _LENGTH & 127 | 128, _LENGTH >> 7 & 127 | 128, _LENGTH >> 14)) + _TOPIC


def connected(host: str, port: int) -> socket.socket:
    """A socket on which the broker has accepted us."""
    made = socket.create_connection((host, port))
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.sendall(_CONNECT)
    if made.recv(4, socket.MSG_WAITALL) != b"\x20\x02\x00\x00":
        raise SystemExit("refused")
    return made


def camera(host: str, port: int) -> None:
    """Publish frames as fast as the broker takes them."""
    pictures = [picture.tobytes() for picture in frames()]
    us, number = connected(host, port), 0
    while True:
        number += 1
        us.sendall(_HEAD + struct.pack("<q", time.time_ns()), socket.MSG_MORE)
        us.sendall(pictures[number % len(pictures)])


def mean(host: str, port: int) -> None:
    """Take frames; publish for each the time that it bears."""
    us, out = connected(host, port), connected(host, port)
    us.sendall(b"\x82\x12\x00\x01\x00\x0dframes/camera\x00")
    us.recv(5, socket.MSG_WAITALL)
    packet = bytearray(len(_HEAD) + 8 + SIZE)
    while us.recv_into(packet, len(packet), socket.MSG_WAITALL) == len(packet):
        out.sendall(b"\x30\x1d\x00\x0bframes/mean" + packet[len(_HEAD) : len(_HEAD) + 8] + bytes(8))


if __name__ == "__main__":
    {"camera": camera, "mean": mean}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
