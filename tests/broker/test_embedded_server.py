"""The embedded broker on real sockets, with foreign clients: paho and mosquitto's."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import mqtt5
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from mqtt5 import ConnAckPacket, ConnectPacket, DisconnectPacket, PublishPacket, QoS, SubscribePacket, TopicFilter
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from broker.embedded.access import Rule, Users, hash_password
from broker.embedded.limits import Limits
from broker.embedded.server import TLS, EmbeddedBroker, Listener
from schemas.errors import ConfigError

new_properties: Any = Properties
"""paho's class has no types."""
V5, V3 = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311
BOTH = pytest.mark.parametrize("version", [V5, V3], ids=["5", "3.1.1"])


def until(condition: Callable[[], object], what: str, seconds: float = 15) -> None:
    """Wait for a condition; it fails with ``what``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


class Served:
    """A broker in a thread of its own, so that blocking clients can be used."""

    def __init__(self, *listen: Listener, **options: Any) -> None:
        self.broker = EmbeddedBroker(listen or (Listener(),), **options)
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        async def main() -> None:
            async with self.broker:
                self._ready.set()
                await self._stop.wait()

        with contextlib.closing(self._loop):
            self._loop.run_until_complete(main())

    def __enter__(self) -> EmbeddedBroker:
        self._thread.start()
        assert self._ready.wait(10)
        return self.broker

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()


class Person:
    """A paho client with a record of what it saw."""

    def __init__(
        self, port: int, client_id: str = "", version: MQTTProtocolVersion = V5, *, clean: bool = True, **options: Any
    ) -> None:
        extra: dict[str, Any] = {} if version == V5 else {"clean_session": clean}
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=version, **extra)
        self.messages: list[paho.MQTTMessage] = []
        self.granted: list[list[int]] = []
        self.connected: list[tuple[int, bool]] = []
        self.ended: list[int] = []
        self.client.on_message = lambda _c, _u, message: self.messages.append(message)
        self.client.on_subscribe = lambda _c, _u, _m, codes, _p: self.granted.append([c.value for c in codes])
        self.client.on_connect = lambda _c, _u, flags, code, _p: self.connected.append(
            (code.value, flags.session_present)
        )
        self.client.on_disconnect = lambda _c, _u, _f, code, _p: self.ended.append(code.value)
        self.client.reconnect_delay_set(60, 60)
        if user := options.pop("user", None):
            self.client.username_pw_set(*user)
        if will := options.pop("will", None):
            self.client.will_set(*will)
        if context := options.pop("tls", None):
            self.client.tls_set_context(context)
        if version == V5:
            properties = new_properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = options.pop("seconds", 0)
            options |= {"clean_start": clean, "properties": properties}
        self.client.connect("127.0.0.1", port, **options)
        self.client.loop_start()
        until(lambda: self.connected, "no CONNACK")

    def subscribe(self, pattern: str, qos: int = 0, **options: Any) -> int:
        self.client.subscribe(pattern, options=SubscribeOptions(qos, **options)) if options else self.client.subscribe(
            pattern, qos
        )
        until(lambda: self.granted, "no SUBACK")
        return self.granted.pop()[0]

    def publish(self, topic: str, payload: bytes, qos: int = 1, **options: Any) -> None:
        self.client.publish(topic, payload, qos, **options).wait_for_publish(10)

    def await_messages(self, count: int) -> None:
        until(lambda: len(self.messages) >= count, f"{len(self.messages)} messages instead of {count}")
        assert len(self.messages) == count

    def leave(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def vanish(self) -> None:
        """Cut the connection without DISCONNECT."""
        sock = self.client.socket()
        assert isinstance(sock, socket.socket)
        self.client._reconnect_on_failure = False
        sock.shutdown(socket.SHUT_RDWR)
        until(lambda: self.ended, "still connected")
        self.client.loop_stop()


@contextlib.contextmanager
def people(port: int) -> Iterator[Callable[..., Person]]:
    """A maker of clients, which all leave at the end."""
    made: list[Person] = []

    def make(*arguments: Any, **options: Any) -> Person:
        made.append(Person(port, *arguments, **options))
        return made[-1]

    try:
        yield make
    finally:
        for person in made:
            person.leave()


@BOTH
def test_paho(version: MQTTProtocolVersion) -> None:
    """All QoS, large and empty payloads, retained, will, take-over, and a session that is kept."""
    with Served() as broker, people(broker.port) as person:
        sub = person("sub", version)
        assert sub.subscribe("t/#", 2) == 2
        pub = person("pub", version, will=("t/will", b"gone", 1, True))
        big = os.urandom(3_000_000)
        for qos in range(3):
            for payload in (b"small", b"", big):
                pub.publish("t/x", payload, qos)
        until(lambda: len(sub.messages) == 9, "not all came")
        assert sorted((m.qos, len(m.payload)) for m in sub.messages) == sorted(
            (q, n) for q in range(3) for n in (5, 0, len(big))
        )
        assert all(m.payload == big for m in sub.messages if len(m.payload) > 5)
        pub.vanish()
        until(lambda: len(sub.messages) == 10, "no will")
        late = person("late", version)
        late.subscribe("t/will", 1)
        until(lambda: late.messages, "no retained message")
        assert (late.messages[0].payload, late.messages[0].retain) == (b"gone", True)
        kept = person("kept", version, clean=False, **({"seconds": 60} if version == V5 else {}))
        assert kept.subscribe("q", 1) == 1
        kept.leave()
        for i in range(50):
            sub.publish("q", b"%d" % i)
        again = person("kept", version, clean=False, **({"seconds": 60} if version == V5 else {}))
        until(lambda: len(again.messages) == 50, "queued messages are missing")
        assert again.connected == [(0, True)]
        assert [int(m.payload) for m in again.messages] == list(range(50))
        person("kept", version)
        until(lambda: again.ended, "not taken over")
        if version == V5:
            assert again.ended == [0x8E]


def test_versions_mix() -> None:
    with Served() as broker, people(broker.port) as person:
        old, new = person("old", V3), person("new", V5)
        for one in (old, new):
            one.subscribe("t", 2)
        properties = new_properties(PacketTypes.PUBLISH)
        properties.ContentType = "application/msgpack"
        properties.UserProperty = [("a", "1")]
        for qos in range(3):
            new.publish("t", b"new", qos, properties=properties)
            old.publish("t", b"old", qos)
        for one in (old, new):
            one.await_messages(6)
            assert sorted(m.payload for m in one.messages) == [b"new"] * 3 + [b"old"] * 3
        types = {m.payload: getattr(m.properties, "ContentType", None) for m in new.messages}
        assert types == {b"new": "application/msgpack", b"old": None}


def test_subscription_options_with_paho() -> None:
    with Served() as broker, people(broker.port) as person:
        one = person("one")
        one.publish("t", b"kept", retain=True)
        one.subscribe("t", 1, noLocal=True, retainAsPublished=True, retainHandling=2)
        one.publish("t", b"own")
        person("two").publish("t", b"other", retain=True)
        until(lambda: one.messages, "nothing came")
        assert [(m.payload, m.retain) for m in one.messages] == [(b"other", True)]


@pytest.mark.connected
@pytest.mark.skipif(shutil.which("mosquitto_sub") is None, reason="mosquitto's clients are not installed")
@pytest.mark.parametrize("version", ["5", "311"])
def test_mosquitto_clients(version: str) -> None:
    with Served() as broker:
        common = ["-V", version, "-h", "127.0.0.1", "-p", str(broker.port)]
        subscriber = subprocess.Popen(
            [
                "mosquitto_sub",
                *common,
                "-q",
                "2",
                "-t",
                "m/+",
                "-t",
                "$SYS/broker/version",
                "-C",
                "4",
                "-F",
                "%t %q %p",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        until(lambda: broker.core.router.subscriptions.count == 2, "not subscribed")
        for qos in "012":
            subprocess.run(
                ["mosquitto_pub", *common, "-q", qos, "-t", f"m/{qos}", "-m", f"v{qos}"], check=True, timeout=10
            )
        output, _ = subscriber.communicate(timeout=10)
        assert subscriber.returncode == 0
        lines = output.splitlines()
        assert [line for line in lines if line.startswith("m/")] == ["m/0 0 v0", "m/1 1 v1", "m/2 2 v2"]
        assert any(line.startswith("$SYS/broker/version 0 penstock") for line in lines)


def test_users_and_rights() -> None:
    users = Users({"ann": hash_password("right")})
    acl = [Rule("ann", ["own/#"], ["own/#"]), Rule("*", ["open"], ["open"])]
    with Served(users=users, anonymous=True, acl=acl) as broker, people(broker.port) as person:
        assert person("w", user=("ann", "wrong")).connected[0] == (0x86, False)
        assert person("x", V3, user=("ann", "wrong")).connected[0][0] in {0x86, 4}
        assert person("y", user=("bob", "right")).connected[0] == (0x86, False)
        ann = person("ann", user=("ann", "right"))
        assert ann.connected == [(0, False)]
        codes: list[int] = []
        ann.client.on_publish = lambda _c, _u, _m, code, _p: codes.append(code.value)
        assert ann.subscribe("own/#", 1) == 1
        assert ann.subscribe("#", 1) == 0x87, "wider than the rights: refused, not filtered"
        ann.publish("own/x", b"1")
        ann.publish("other", b"2")
        ann.publish("other", b"plain", 0)
        until(lambda: len(codes) == 3, "no PUBACK")
        assert codes == [0, 0x87, 0]
        until(lambda: ann.messages, "nothing came")
        nobody = person("nobody")
        assert nobody.subscribe("own/x", 1) == 0x87
        assert nobody.subscribe("open", 1) == 1
        assert person("v3", V3).subscribe("own/x", 1) == 0x80
        assert [m.topic for m in ann.messages] == ["own/x"]
        # The client id belongs to ann while her session lives.
        assert person("ann").connected[0] == (0x87, False)
    with Served(users=users) as broker, people(broker.port) as person:
        assert person("n").connected[0] == (0x87, False)


# TLS


class Authority:
    """A certificate authority of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self.certificate = self._sign(self._name, self._key, x509.BasicConstraints(ca=True, path_length=None))
        self.path = folder / "ca.pem"
        self.path.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def _sign(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, constraints: x509.BasicConstraints
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(constraints, critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256())

    def issue(self, name: str) -> tuple[Path, Path]:
        """Certificate and key files."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._sign(subject, key, x509.BasicConstraints(ca=False, path_length=None))
        paths = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return paths


def let_in(context: ssl.SSLContext, port: int) -> bool:
    """Whether a CONNECT over TLS is answered. With TLS 1.3 a refusal comes after the client's handshake."""
    try:
        with context.wrap_socket(socket.create_connection(("127.0.0.1", port))) as link:
            link.settimeout(5)
            link.sendall(ConnectPacket("x").write())
            return bool(link.recv(100))
    except OSError:
        return False


def test_tls_with_client_certificates(tmp_path: Path) -> None:
    """The common name is the user; without a certificate there is no way in; rubbish on the port harms nobody."""
    authority = Authority(tmp_path)
    certificate, key = authority.issue("localhost")
    tls = TLS(certificate=certificate, key=key, clients=authority.path)
    acl = [Rule("pump-7", ["p/%u/#"], ["p/%u/#"])]
    with Served(Listener(tls=tls), Listener(), acl=acl) as broker, people(broker.port) as person:
        assert broker.url.startswith("mqtts://")
        context = ssl.create_default_context(cafile=str(authority.path))
        context.check_hostname = False
        assert let_in(context, broker.port) is False, "without a certificate"
        with socket.create_connection(("127.0.0.1", broker.port)) as rubbish:
            rubbish.sendall(b"GET / HTTP/1.1\r\n\r\n")
        context.load_cert_chain(*authority.issue("pump-7"))
        assert let_in(context, broker.port)
        pump = person("any", tls=context)
        assert pump.connected == [(0, False)]
        assert pump.subscribe("p/pump-7/#", 1) == 1
        assert pump.subscribe("p/pump-8/#", 1) == 0x87
        pump.publish("p/pump-7/a", b"x" * 500_000)
        until(lambda: pump.messages, "nothing came")
        assert len(pump.messages[0].payload) == 500_000


def test_wrong_certificate_files(tmp_path: Path) -> None:
    async def main() -> None:
        broker = EmbeddedBroker([Listener(tls=TLS(certificate=tmp_path / "none", key=tmp_path / "none"))])
        with pytest.raises(ConfigError, match="cannot be used"):
            await broker.open()

    asyncio.run(main())


# asyncio clients, for what paho cannot be made to do


class Raw:
    """Bytes in, packets out."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._data = b""

    @classmethod
    async def connect(cls, port: int, client_id: str, **options: Any) -> Raw:
        raw = cls(*await asyncio.open_connection("127.0.0.1", port))
        raw.writer.write(ConnectPacket(client_id, clean_start=True, **options).write())
        packet = await raw.read()
        assert isinstance(packet, ConnAckPacket)
        assert int(packet.reason_code) == 0
        return raw

    async def subscribe(self, pattern: str, qos: int) -> None:
        self.writer.write(SubscribePacket(1, [TopicFilter(pattern, max_qos=QoS(qos))]).write())
        assert isinstance(await self.read(), mqtt5.SubAckPacket)

    async def read(self) -> mqtt5.Packet | None:
        """The next packet; None at the end."""
        while True:
            with contextlib.suppress(IndexError):
                packet, size = mqtt5.read(memoryview(self._data))
                self._data = self._data[size:]
                return packet
            data = await asyncio.wait_for(self.reader.read(65_536), 15)
            if not data:
                return None
            self._data += data


@contextlib.asynccontextmanager
async def raws(broker: EmbeddedBroker) -> AsyncIterator[Callable[..., Coroutine[Any, Any, Raw]]]:
    made: list[Raw] = []

    async def make(client_id: str, **options: Any) -> Raw:
        made.append(await Raw.connect(broker.port, client_id, **options))
        return made[-1]

    try:
        yield make
    finally:
        for raw in made:
            raw.writer.close()
            with contextlib.suppress(OSError):
                await raw.writer.wait_closed()


def test_a_reader_that_stands_still_disturbs_nobody() -> None:
    """QoS 0: what it does not take is dropped and counted, memory is bounded, the others get everything."""

    async def main() -> None:
        limits = Limits(out_bytes=300_000)
        async with EmbeddedBroker(limits=limits) as broker, raws(broker) as connect:
            still, brisk, publisher = await connect("still"), await connect("brisk"), await connect("p")
            await still.subscribe("t", 0)
            await brisk.subscribe("t", 0)
            still.reader._transport.pause_reading()  # type: ignore[attr-defined]  # asyncio has no public way to
            packet = PublishPacket("t", bytes(10_000)).write()
            total = 3000
            for _ in range(total // 10):
                publisher.writer.write(packet * 10)
                await publisher.writer.drain()
                for _ in range(10):
                    assert isinstance(await brisk.read(), PublishPacket)
            session = broker.core.entrance.sessions["still"]
            assert session.conn is not None
            assert session.conn.pending <= limits.out_bytes
            dropped = broker.core.stats.dropped
            assert dropped > total // 4
            still.reader._transport.resume_reading()  # type: ignore[attr-defined]  # as above
            for _ in range(total - dropped):
                assert isinstance(await still.read(), PublishPacket)
            assert broker.core.stats.dropped == dropped

    asyncio.run(main())


def test_clients_learn_that_the_broker_ends() -> None:
    async def main() -> None:
        async with EmbeddedBroker() as broker:
            client = await Raw.connect(broker.port, "c")
            late = await asyncio.open_connection("127.0.0.1", broker.port)
        packet = await client.read()
        assert isinstance(packet, DisconnectPacket)
        assert int(packet.reason_code) == 0x8B
        assert await client.read() is None
        assert await late[0].read() == b""
        for writer in (client.writer, late[1]):
            writer.close()
            await writer.wait_closed()

    asyncio.run(main())


def test_it_can_be_opened_again_and_closed_twice() -> None:
    async def main() -> None:
        broker = EmbeddedBroker()
        for _ in range(2):
            async with broker:
                client = await Raw.connect(broker.port, "c")
                client.writer.close()
                await client.writer.wait_closed()
            await broker.close()

    asyncio.run(main())


def test_unix_socket(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "mqtt"
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(str(path))
        stale.close()
        async with EmbeddedBroker([Listener(unix=path)]) as broker:
            assert broker.url == f"mqtt+unix://{path}"
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(ConnectPacket("c").write())
            assert (await reader.read(100))[0] == 0x20
            with pytest.raises(ConfigError, match="cannot be bound"):
                await EmbeddedBroker([Listener(unix=path)]).open()
            writer.close()
            await writer.wait_closed()
        assert not path.exists()

    asyncio.run(main())


def test_a_port_in_use_is_said_clearly() -> None:
    async def main() -> None:
        async with EmbeddedBroker() as broker:
            with pytest.raises(ConfigError, match=f"127.0.0.1:{broker.port} cannot be bound"):
                await EmbeddedBroker([Listener(port=broker.port)]).open()

    asyncio.run(main())


def test_keep_alive_on_the_wire() -> None:
    async def main() -> None:
        async with EmbeddedBroker() as broker:
            client = await Raw.connect(broker.port, "c", keep_alive=1)
            start = time.monotonic()
            packet = await client.read()
            assert isinstance(packet, DisconnectPacket)
            assert int(packet.reason_code) == 0x8D
            assert 1.4 < time.monotonic() - start < 4
            client.writer.close()
            await client.writer.wait_closed()

    asyncio.run(main())


def test_timers_that_are_late_already() -> None:
    """uvloop calls them at once, and gives a handle of another kind."""
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        async with EmbeddedBroker() as broker:
            done = asyncio.Event()
            loop = asyncio.get_running_loop()
            for _ in range(3):
                broker.core.timers.at(loop.time() - 1, lambda now: done.set())
                broker._turn()
            await asyncio.wait_for(done.wait(), 5)
            assert broker._timer is not None
            assert broker._due > loop.time()

    uvloop.run(main())


def test_garbage_on_many_connections() -> None:
    """Real sockets, cut at any place; the broker lives and forgets them all."""

    async def main() -> None:
        async with EmbeddedBroker() as broker, raws(broker) as connect:
            good = await connect("good")
            await good.subscribe("t", 1)
            for i in range(60):
                _, writer = await asyncio.open_connection("127.0.0.1", broker.port)
                writer.write((b"", ConnectPacket(f"c{i}").write())[i % 2] + os.urandom(i * 7))
                with contextlib.suppress(OSError):
                    await writer.drain()
                if i % 3:
                    writer.transport.abort()
                writer.close()
            good.writer.write(PublishPacket("t", b"x", qos=QoS(1), packet_id=1).write())
            packets = [await good.read(), await good.read()]
            assert any(isinstance(p, PublishPacket) for p in packets)
            for _ in range(500):
                if broker.core.stats.connected == 1:
                    break
                await asyncio.sleep(0.01)
            assert broker.core.stats.connected == 1

    asyncio.run(main())


# As a process


def run_broker(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "broker.embedded", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_as_a_process(number: signal.Signals) -> None:
    with run_broker("--listen", "127.0.0.1:0", "--limit", "connections=5") as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["pid"] == process.pid
        port = int(ready["addresses"][0].rpartition(":")[2])
        with people(port) as person:
            one = person("one")
            process.send_signal(number)
            assert process.wait(10) == 0
            until(lambda: one.ended, "not told")
            assert one.ended[0] == 0x8B
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--listen", "nonsense"), "'nonsense': expected host:port or unix:/path"),
        (("--limit", "conections=5"), "unknown limit 'conections'; did you mean 'connections'?"),
        (("--limit", "connections=-1"), "'connections=-1': expected a positive number"),
        (("--users", "/nowhere"), "the password file cannot be read"),
        (("--listen-tls", "127.0.0.1:0"), "a TLS listener needs --cert and --key"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], error: str) -> None:
    with run_broker(*arguments) as process:
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 2
        assert error in json.loads(errors)["error"]


def test_it_imports_little() -> None:
    """It must start fast on a small computer."""
    code = "import sys, broker.embedded.__main__; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    modules = set(found.stdout.split())
    assert not modules & {"numpy", "pydantic", "msgspec", "structlog", "typer", "rich", "aiomqtt", "nodes"}
