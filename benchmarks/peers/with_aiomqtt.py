"""The benchmarks' work with aiomqtt: ``python with_aiomqtt.py PORT telemetry|relay|gathered [QOS]``.

uvloop where it is installed; publications by a bounded number of tasks, so that none waits for the one before. JSON by
msgspec, typed. What the work is, says ``program.c``.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time

import aiomqtt
import msgspec

CONCURRENT = 64


class Reading(msgspec.Struct, gc=False):
    """What a device sends; with °F for °C what goes on."""

    device: str
    temperature: float
    humidity: float
    ts: int
    seq: int


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Reading).decode
Out = asyncio.Queue[tuple[str, bytes]]


class Telemetry:
    """°C to °F, a range, alarms, one-second means per device."""

    def __init__(self, out: Out) -> None:
        self._out = out
        self._second = 0
        self._open: dict[str, list[float]] = {}  # device → number, sum

    async def take(self, payload: bytes) -> None:
        """One reading."""
        reading = decode(payload)
        fahrenheit = reading.temperature * 1.8 + 32
        if not -40 <= fahrenheit <= 185:
            return
        if fahrenheit > 104:
            reading.temperature = fahrenheit
            await self._out.put(("farm/out", encode(reading)))
        second = reading.ts // 1000
        if second > self._second:
            await self._close(second)
        window = self._open.get(reading.device)
        if window is None:
            self._open[reading.device] = [1, fahrenheit]
        else:
            window[0] += 1
            window[1] += fahrenheit

    async def _close(self, second: int) -> None:
        ended, start = self._open, self._second
        self._open, self._second = {}, second
        for device, (n, total) in ended.items():
            mean = {"device": device, "start": start, "n": n, "mean": total / n}
            await self._out.put((f"farm/{device}/mean", encode(mean)))

    async def clock(self) -> None:
        """Windows end by the clock too, if nothing comes any more."""
        while True:
            await asyncio.sleep(1)
            if time.time() > self._second + 2:
                await self._close(int(time.time()))


class Relay:
    """°F for °C: one message in, one message out; or ``gathered``, those of 2 ms in one message, at most 256."""

    def __init__(self, out: Out, gathered: bool) -> None:
        self._out = out
        self._gathered = gathered
        self._batch: list[Reading] = []

    async def take(self, payload: bytes) -> None:
        """One reading."""
        reading = decode(payload)
        reading.temperature = reading.temperature * 1.8 + 32
        if not self._gathered:
            await self._out.put(("farm/out", encode(reading)))
            return
        self._batch.append(reading)
        if len(self._batch) >= 256:
            await self._send()

    async def clock(self) -> None:
        """What was gathered goes on, though it be little."""
        while self._gathered:
            await asyncio.sleep(0.002)
            await self._send()

    async def _send(self) -> None:
        batch, self._batch = self._batch, []
        if batch:
            await self._out.put(("farm/out", encode({"n": len(batch), "readings": batch})))


async def work(port: int, kind: str, qos: int) -> None:
    """Until it is killed."""
    no_delay = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    async with aiomqtt.Client(
        "127.0.0.1", port, identifier="with-aiomqtt", socket_options=[no_delay], max_inflight_messages=1000
    ) as client:
        client.pending_calls_threshold = 2 * CONCURRENT  # below it, it warns of each
        out: Out = asyncio.Queue(4 * CONCURRENT)

        async def publisher() -> None:
            while True:
                topic, payload = await out.get()
                await client.publish(topic, payload, qos)

        program: Telemetry | Relay = Telemetry(out) if kind == "telemetry" else Relay(out, kind == "gathered")
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CONCURRENT):
                tasks.create_task(publisher())
            tasks.create_task(program.clock())
            await client.subscribe("farm/+/reading", qos)
            async for message in client.messages:
                await program.take(message.payload)


def main() -> None:
    """Entry."""
    port, kind, qos = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0
    try:
        import uvloop
    except ImportError:
        asyncio.run(work(port, kind, qos))
    else:
        uvloop.run(work(port, kind, qos))


if __name__ == "__main__":
    main()
