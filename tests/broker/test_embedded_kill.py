"""A broker with a data folder, killed with SIGKILL under load: what it acknowledged is delivered, QoS 2 exactly once."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import mqtt5
import pytest
from mqtt5 import (
    ConnAckPacket,
    ConnectPacket,
    PubAckPacket,
    PubCompPacket,
    PublishPacket,
    PubRecPacket,
    PubRelPacket,
    QoS,
    SubAckPacket,
    SubscribePacket,
    TopicFilter,
)

ROOT = Path(__file__).parents[2]


class Process:
    """The broker as a process, on one port through all its lives."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.port = 0
        self.lives = 0
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "broker.embedded", "--listen", f"127.0.0.1:{self.port}"),
                *("--data", str(self.data), "--limit", "queue_messages=1000000"),
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.wait(10)
        self.port = int(json.loads(line)["addresses"][0].rpartition(":")[2])
        self.lives += 1

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(20) == 0
        assert self.process.stdout is not None
        self.process.stdout.close()


class Wire:
    """One connection of a client with a session that is kept; OSError when it breaks."""

    def __init__(self, port: int, client_id: str, *, receive_max: int = 65_535) -> None:
        end = time.monotonic() + 15
        while True:
            try:
                self.socket = socket.create_connection(("127.0.0.1", port), 10)
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
        self._data = b""
        try:
            self.send(
                ConnectPacket(client_id, clean_start=False, session_expiry_interval=3600, receive_max=receive_max)
            )
            answer = self.read()
            assert isinstance(answer, ConnAckPacket), answer
            assert int(answer.reason_code) == 0, answer
        except BaseException:
            self.socket.close()
            raise
        self.present = answer.session_present

    def send(self, *packets: mqtt5.Packet) -> None:
        self.socket.sendall(b"".join(p.write() for p in packets))

    def read(self) -> mqtt5.Packet:
        while True:
            with suppress(IndexError):
                packet, size = mqtt5.read(memoryview(self._data))
                self._data = self._data[size:]
                return packet
            data = self.socket.recv(65_536)
            if not data:
                raise ConnectionResetError("closed")
            self._data += data

    def close(self) -> None:
        self.socket.close()


class Publisher(threading.Thread):
    """Publishes numbers with one QoS, as MQTT wants it done: sends again after a reconnect what was not answered."""

    def __init__(self, port: int, qos: int, window: int = 50) -> None:
        super().__init__()
        self.port, self.qos, self.window = port, qos, window
        self.ended = threading.Event()
        self.acknowledged: list[int] = []
        self.error: BaseException | None = None
        self._open: dict[int, int | None] = {}
        """Packet identifier -> number; None once PUBREC came."""
        self._number = 0
        self._id = 0

    def run(self) -> None:
        try:
            while not (self.ended.is_set() and not self._open):
                wire = None
                try:
                    wire = Wire(self.port, f"publisher-{self.qos}")
                    self._again(wire)
                    self._serve(wire)
                except (OSError, AssertionError):
                    if wire is None and self.ended.is_set():
                        raise
                finally:
                    if wire is not None:
                        wire.close()
        except BaseException as error:  # noqa: BLE001 - the test raises it
            self.error = error

    def _packet(self, packet_id: int, number: int, *, again: bool) -> PublishPacket:
        return PublishPacket(f"t/{self.qos}", b"%d" % number, qos=QoS(self.qos), packet_id=packet_id, duplicate=again)

    def _again(self, wire: Wire) -> None:
        assert wire.present or not self._open, "the broker forgot the publisher's session"
        for packet_id, number in self._open.items():
            wire.send(PubRelPacket(packet_id) if number is None else self._packet(packet_id, number, again=True))

    def _serve(self, wire: Wire) -> None:
        while True:
            while len(self._open) < self.window and not self.ended.is_set():
                self._id = self._id % 60_000 + 1
                fresh, self._number = self._number, self._number + 1  # before it is sent: that may fail half-way
                self._open[self._id] = fresh
                wire.send(self._packet(self._id, fresh, again=False))
            if not self._open:
                return
            packet = wire.read()
            if isinstance(packet, PubRecPacket):
                assert int(packet.reason_code) < 0x80, packet
                number = self._open[packet.packet_id]
                if number is not None:
                    self.acknowledged.append(number)
                    # Put to the end: PUBRELs keep the order of their PUBRECs.
                    del self._open[packet.packet_id]
                    self._open[packet.packet_id] = None
                wire.send(PubRelPacket(packet.packet_id))
            elif isinstance(packet, PubAckPacket):
                assert int(packet.reason_code) < 0x80, packet
                number = self._open.pop(packet.packet_id)
                assert number is not None
                self.acknowledged.append(number)
            elif isinstance(packet, PubCompPacket):
                self._open.pop(packet.packet_id, None)
            else:
                raise AssertionError(packet)


class Subscriber(threading.Thread):
    """Keeps what it gets. For QoS 2 it holds packet identifiers until PUBREL, over reconnects, as 4.3.3 says."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self.got: dict[str, list[int]] = {"t/1": [], "t/2": []}
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self._held: set[int] = set()

    def subscribe(self) -> None:
        wire = Wire(self.port, "subscriber")
        wire.send(SubscribePacket(1, [TopicFilter("t/#", max_qos=QoS(2))]))
        assert isinstance(wire.read(), SubAckPacket)
        wire.close()

    def run(self) -> None:
        try:
            while not self.ended.is_set():
                with suppress(OSError):
                    wire = Wire(self.port, "subscriber", receive_max=30)
                    assert wire.present, "the broker forgot the subscriber's session"
                    wire.socket.settimeout(0.5)
                    try:
                        self._serve(wire)
                    finally:
                        wire.close()
        except BaseException as error:  # noqa: BLE001 - the test raises it
            self.error = error

    def _serve(self, wire: Wire) -> None:
        while not self.ended.is_set():
            try:
                packet = wire.read()
            except TimeoutError:
                continue
            if isinstance(packet, PublishPacket):
                assert packet.packet_id is not None
                if int(packet.qos) == 1:
                    self.got[packet.topic].append(int(packet.payload))
                    wire.send(PubAckPacket(packet.packet_id))
                else:
                    if packet.packet_id not in self._held:
                        self._held.add(packet.packet_id)
                        self.got[packet.topic].append(int(packet.payload))
                    wire.send(PubRecPacket(packet.packet_id))
            elif isinstance(packet, PubRelPacket):
                self._held.discard(packet.packet_id)
                wire.send(PubCompPacket(packet.packet_id))


def check(publishers: list[Publisher], subscriber: Subscriber) -> None:
    once, exactly = (Counter(subscriber.got[f"t/{p.qos}"]) for p in publishers)
    missing = set(publishers[0].acknowledged) - set(once)
    assert not missing, f"QoS 1, acknowledged and lost: {sorted(missing)[:10]}"
    twice = [n for n, count in exactly.items() if count > 1]
    assert not twice, f"QoS 2, twice: {twice[:10]}"
    missing = set(publishers[1].acknowledged) - set(exactly)
    assert not missing, f"QoS 2, acknowledged and lost: {sorted(missing)[:10]}"
    for topic in ("t/1", "t/2"):
        first = list(dict.fromkeys(subscriber.got[topic]))
        assert first == sorted(first), f"{topic}: out of order"


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["subscriber there", "subscriber away"])
def test_killed_under_load(tmp_path: Path, there: bool) -> None:
    """SIGKILL at random moments. ``there``: a subscriber takes messages all the time, else it comes at the end.

    ``PENSTOCK_SEED`` and ``PENSTOCK_KILLS`` make another, or a longer, run of it.
    """
    choice = random.Random(int(os.environ.get("PENSTOCK_SEED", "7")) + there)
    broker = Process(tmp_path / "data")
    subscriber = Subscriber(broker.port)
    subscriber.subscribe()
    wire = Wire(broker.port, "keeper")
    wire.send(PublishPacket("kept", b"for long", qos=QoS(1), packet_id=1, retain=True))
    assert isinstance(wire.read(), PubAckPacket)
    wire.close()
    publishers = [Publisher(broker.port, qos) for qos in (1, 2)]
    threads: list[threading.Thread] = [*publishers, *([subscriber] if there else [])]
    try:
        for thread in threads:
            thread.start()
        for _ in range(int(os.environ.get("PENSTOCK_KILLS", "8"))):
            time.sleep(choice.uniform(0.02, 0.35))
            broker.kill()
            broker.start()
        for publisher in publishers:
            publisher.ended.set()
            publisher.join(30)
            assert publisher.error is None, publisher.error
            assert not publisher.is_alive()
        if not there:
            subscriber.start()
        end = time.monotonic() + 20
        while time.monotonic() < end and not all(
            set(p.acknowledged) <= set(subscriber.got[f"t/{p.qos}"]) for p in publishers
        ):
            time.sleep(0.05)
    finally:
        for publisher in publishers:
            publisher.ended.set()
        subscriber.ended.set()
        if subscriber.ident:
            subscriber.join(20)
    assert subscriber.error is None, subscriber.error
    check(publishers, subscriber)
    assert min(len(p.acknowledged) for p in publishers) > 100
    wire = Wire(broker.port, "keeper")
    wire.send(SubscribePacket(1, [TopicFilter("kept")]))
    assert isinstance(wire.read(), SubAckPacket)
    kept = wire.read()
    assert isinstance(kept, PublishPacket)
    assert kept.payload == b"for long"
    wire.close()
    broker.stop()
