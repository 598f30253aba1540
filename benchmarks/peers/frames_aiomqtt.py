"""Frames with aiomqtt on uvloop: ``python -m benchmarks.peers.frames_aiomqtt camera|mean HOST PORT``."""

from __future__ import annotations

import asyncio
import struct
import sys
import time

import aiomqtt
import numpy as np

from benchmarks.peers.frames_common import SIZE, brightness, frames


async def camera(host: str, port: int) -> None:
    """Publish frames as fast as they go; each begins with the time in ns."""
    pictures = [picture.tobytes() for picture in frames()]
    async with aiomqtt.Client(host, port, max_queued_outgoing_messages=8) as client:
        number = 0
        while True:
            number += 1
            payload = struct.pack("<q", time.time_ns()) + pictures[number % len(pictures)]
            await client.publish("frames/camera", payload)


async def mean(host: str, port: int) -> None:
    """Take frames, publish time and mean."""
    async with aiomqtt.Client(host, port) as client:
        await client.subscribe("frames/camera")
        async for message in client.messages:
            payload = bytes(message.payload)
            picture = np.frombuffer(payload, np.uint8, SIZE, 8)
            await client.publish("frames/mean", payload[:8] + struct.pack("<d", brightness(picture)))


if __name__ == "__main__":
    run = {"camera": camera, "mean": mean}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
    try:
        import uvloop
    except ImportError:
        asyncio.run(run)
    else:
        uvloop.run(run)
