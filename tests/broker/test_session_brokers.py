"""Session and legacy client against brokers that refuse, restart, encrypt, or speak an old protocol."""

from __future__ import annotations

import asyncio
import base64
import gc
import hashlib
import json
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from bus_site import Mosquitto, Proxy, collect, nothing, sequence, until

from broker.bus import Bus, Publication, Will
from broker.connect import Negotiated, connect
from broker.embedded.limits import Limits
from broker.embedded.server import EmbeddedBroker, Listener
from broker.legacy import Legacy
from broker.session import Session
from broker.session_options import Options
from schemas.errors import ConfigError, ConnectError, DeniedError, PacketTooLargeError, PublishFailedError

Start = Callable[..., Mosquitto]
KINDS = pytest.mark.parametrize("kind", [Session, Legacy])


def go(main: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(40):
            await main

    asyncio.run(limited())


def url(broker: Mosquitto, scheme: str = "mqtt") -> str:
    return f"{scheme}://127.0.0.1:{broker.port}"


def numbers(count: int, start: int = 0, topic: str = "v", qos: int = 1) -> list[Publication]:
    return [Publication(topic, str(i).encode(), qos) for i in range(start, start + count)]


# restarts


@pytest.mark.connected
@KINDS
def test_mosquitto_is_killed_and_restarted(mosquitto: Start, kind: type[Bus]) -> None:
    broker = mosquitto("persistence true", "autosave_interval 1", "autosave_on_changes true")

    async def main() -> None:
        options: dict[str, Any] = {"backoff": 0.02, "max_backoff": 0.1, "session_expiry": 60}
        there = kind(url(broker), Options(client_id="there", **options))  # type: ignore[call-arg] # of both kinds
        here = kind(url(broker), Options(client_id="here", **options))  # type: ignore[call-arg]
        async with there, here:
            subscription = await here.subscribe(["v"])
            seen: set[int] = set()
            await (await there.publish(numbers(10)))
            seen.update(sequence(await collect(subscription, 10)))
            receipt = await there.publish(numbers(10, 10))
            broker.stop(kill=True)
            await until(lambda: not there.connected and not here.connected)
            waiting = asyncio.create_task(there.publish(numbers(10, 20)))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            broker.start()
            await until(lambda: there.connected and here.connected)
            await receipt
            await (await waiting)
            while 29 not in seen:
                seen.update(sequence(await collect(subscription, 1)))
            assert set(range(10)) | set(range(20, 30)) <= seen  # mosquitto may lose what it held when killed

    go(main())


@KINDS
def test_the_embedded_broker_restarts(kind: type[Bus]) -> None:
    async def main() -> None:
        broker = EmbeddedBroker()
        await broker.open()
        port = broker.port
        where = broker.url
        options = Options(backoff=0.02, max_backoff=0.1)
        there, here = kind(where, options), kind(where, options)  # type: ignore[call-arg] # of both kinds
        async with there, here:
            subscription = await here.subscribe(["v"])
            await broker.close()
            await until(lambda: not there.connected and not here.connected)
            async with EmbeddedBroker([Listener(port=port)]):
                await until(lambda: there.connected and here.connected and bool(subscription))
                await (await there.publish(numbers(5)))
                assert sequence(await collect(subscription, 5)) == [0, 1, 2, 3, 4]

    go(main())


# rights


@pytest.mark.connected
def test_rights_by_acl_file(mosquitto: Start, tmp_path: Path) -> None:
    acl = tmp_path / "acl"
    acl.write_text("topic readwrite mine/#\ntopic read theirs/#\n")
    broker = mosquitto(f"acl_file {acl}")

    async def main() -> None:
        async with Session(url(broker)) as bus:
            subscription = await bus.subscribe(["mine/#"])
            receipt = await bus.publish(
                [
                    Publication("mine/a", b"0", 1),
                    Publication("theirs/a", b"1", 1),
                    Publication("theirs/alias/b", b"2", 0),
                    Publication("mine/b", b"3", 1),
                ]
            )
            with pytest.raises(PublishFailedError) as caught:
                await receipt
            ((index, error),) = caught.value.failures
            assert isinstance(error, DeniedError)
            assert (index, error.code, error.topic) == (1, 135, "theirs/a")
            assert sequence(await collect(subscription, 2)) == [0, 3]
        async with Legacy(url(broker)) as old:  # 3.1.1 has no word for it: acknowledged and dropped
            await (await old.publish([Publication("theirs/a", b"1", 1)]))

    go(main())


@pytest.mark.connected
@KINDS
def test_rights_by_dynamic_security(mosquitto: Start, tmp_path: Path, kind: type[Bus]) -> None:
    plugin = next(Path("/usr/lib").glob("*/mosquitto_dynamic_security.so"), None)
    if plugin is None:
        pytest.skip("mosquitto's dynamic security is not installed")
    config = tmp_path / "dynsec.json"
    access = {
        "publishClientSend": False,
        "publishClientReceive": True,
        "subscribe": False,
        "unsubscribe": True,
    }
    config.write_text(json.dumps({"defaultACLAccess": access, "clients": [], "groups": [], "roles": []}))
    broker = mosquitto(f"plugin {plugin}", f"plugin_opt_config_file {config}")

    async def main() -> None:
        async with kind(url(broker)) as bus:  # type: ignore[call-arg] # of both kinds
            with pytest.raises(DeniedError):
                await bus.subscribe(["a/#"])
            with pytest.raises(DeniedError):
                await bus.subscribe(["a/#"])
            assert bus.connected

    go(main())


@pytest.mark.connected
@KINDS
def test_wrong_credentials_are_permanent(mosquitto: Start, tmp_path: Path, kind: type[Bus]) -> None:
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-c", "-b", str(passwords), "u", "right"], check=True)
    passwords.chmod(0o644)
    broker = mosquitto("allow_anonymous false", f"password_file {passwords}")

    async def main() -> None:
        for options in (Options(), Options(user="u", password="wrong")):  # noqa: S106 # of a test
            with pytest.raises(ConnectError) as caught:
                await kind(url(broker), options).open()  # type: ignore[call-arg] # of both kinds
            assert caught.value.permanent
            assert caught.value.code in {134, 135}
        async with kind(url(broker).replace("//", "//u:right@")) as bus:  # type: ignore[call-arg]
            assert bus.connected

    go(main())


# sizes


@pytest.mark.connected
def test_packets_larger_than_the_broker_takes(mosquitto: Start) -> None:
    broker = mosquitto("max_packet_size 10000")

    async def main() -> None:
        async with Session(url(broker)) as bus:
            subscription = await bus.subscribe(["v"])
            assert bus.max_payload is not None
            assert 9000 < bus.max_payload < 10000
            fits, over = Publication("v", bytes(9900), 1), Publication("v", bytes(10_000), 1)
            with pytest.raises(PublishFailedError) as caught:
                await (await bus.publish([fits, over, fits, Publication("v", bytes(100_000), 0)]))
            assert [(i, type(e)) for i, e in caught.value.failures] == [
                (1, PacketTooLargeError),
                (3, PacketTooLargeError),
            ]
            assert [len(d.payload) for d in await collect(subscription, 2)] == [9900, 9900]
            assert bus.connected

    go(main())


def test_a_small_embedded_broker() -> None:
    async def main() -> None:
        limits = Limits(packet_bytes=2000, inflight=2)
        async with EmbeddedBroker(limits=limits) as broker, Session(broker.url) as bus:
            subscription = await bus.subscribe(["v"])
            receipt = await bus.publish([*numbers(100), Publication("v", bytes(2000), 1)])
            with pytest.raises(PublishFailedError) as caught:
                await receipt
            assert [i for i, _ in caught.value.failures] == [100]
            assert sequence(await collect(subscription, 100)) == list(range(100))

    go(main())


# other ways in


class WebSocketFront:
    """MQTT over WebSockets (RFC 6455) in front of a TCP broker; several packets may come in one frame."""

    def __init__(self, port: int) -> None:
        self.port = 0
        self.path = ""
        self._to = port
        self._server: asyncio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.append(task)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.path = head.split()[1]
        key = next(line.split(": ")[1] for line in head.split("\r\n") if line.lower().startswith("sec-websocket-key"))
        digest = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode(), usedforsecurity=False).digest()
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Protocol: mqtt\r\nSec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
        )
        back, there = await asyncio.open_connection("127.0.0.1", self._to)

        async def inwards() -> None:
            while True:
                first, size = await reader.readexactly(2)
                size &= 127
                if size > 125:
                    size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8), "big")
                mask = await reader.readexactly(4)
                data = np.frombuffer(await reader.readexactly(size), np.uint8)
                if first & 15 == 8:
                    return
                there.write((data ^ np.resize(np.frombuffer(mask, np.uint8), size)).tobytes())

        async def outwards() -> None:
            while data := await back.read(60_000):
                size = len(data)
                length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")
                writer.write(b"\x82" + length + data)
                await writer.drain()

        ways = [asyncio.create_task(inwards()), asyncio.create_task(outwards())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            there.close()
            writer.close()
            await asyncio.gather(*ways, return_exceptions=True)


def test_websockets() -> None:
    async def main() -> None:
        async with (
            EmbeddedBroker() as broker,
            WebSocketFront(broker.port) as front,
            connect(f"ws://127.0.0.1:{front.port}/over/here") as bus,
        ):
            assert isinstance(bus, Legacy)
            assert front.path == "/over/here"
            subscription = await bus.subscribe(["v"])
            data = bytes(300_000)
            receipt = await bus.publish([*numbers(500), Publication("v", data, 1)])
            got = await collect(subscription, 501)
            await receipt
            assert sequence(got[:500]) == list(range(500))
            assert got[500].payload == data

    go(main())


@KINDS
def test_unix_sockets(tmp_path: Path, kind: type[Bus]) -> None:
    async def main() -> None:
        path = tmp_path / "s"
        async with EmbeddedBroker([Listener(unix=path)]), kind(f"unix://{path}") as bus:  # type: ignore[call-arg]
            subscription = await bus.subscribe(["v"])
            await (await bus.publish(numbers(100)))
            assert sequence(await collect(subscription, 100)) == list(range(100))

    go(main())


def certificates(folder: Path) -> dict[str, Path]:
    """An authority, a server of localhost and a client, by openssl."""

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], check=True, capture_output=True, cwd=folder)

    ec = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req", "-x509", *ec, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test authority",
        "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
    )  # fmt: skip
    for name, extension in (
        ("server", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        ("client", "subjectAltName=DNS:c"),
    ):
        openssl("req", *ec, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / f"{name}.ext").write_text(
            f"{extension}\nbasicConstraints=CA:FALSE\nauthorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n"
        )
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-out", f"{name}.pem", "-days", "2", "-extfile", f"{name}.ext",
        )  # fmt: skip
    for path in folder.iterdir():
        path.chmod(0o644)
    return {p.name: p for p in folder.iterdir()}


@pytest.mark.connected
@KINDS
# paho leaves the socket of a failed handshake to the garbage collector
@pytest.mark.filterwarnings("ignore:.*ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning")
def test_tls_and_mutual_tls(mosquitto: Start, tmp_path: Path, kind: type[Bus]) -> None:
    folder = tmp_path / "certificates"
    folder.mkdir()
    files = certificates(folder)
    broker = mosquitto()
    broker.stop()
    server = f"certfile {files['server.pem']}\nkeyfile {files['server.key']}\n"
    plain = broker.config.read_text().replace("allow_anonymous", f"{server}allow_anonymous", 1)
    ca = str(files["ca.pem"])

    async def exchange(**options: Any) -> None:
        bus = kind(url(broker, "mqtts"), Options(patience=3.0, **options))  # type: ignore[call-arg] # of both kinds
        async with bus:
            subscription = await bus.subscribe(["v"])
            data = bytes(range(256)) * 4000
            receipt = await bus.publish([*numbers(200), Publication("v", data, 1)])
            got = await collect(subscription, 201)
            await receipt
            assert sequence(got[:200]) == list(range(200))
            assert got[200].payload == data

    async def refusal(**options: Any) -> ConnectError:
        with pytest.raises(ConnectError) as caught:
            await exchange(**options)
        return caught.value

    async def server_only() -> None:
        await exchange(ca=ca)
        error = await refusal()
        assert error.permanent
        assert "certificate" in str(error)
        assert (await refusal(ca=str(files["client.key"]))).permanent
        assert (await refusal(ca=ca, cert="/nowhere.pem")).permanent

    broker.config.write_text(plain)
    broker.start()
    go(server_only())
    broker.stop()

    async def mutual() -> None:
        await exchange(ca=ca, cert=str(files["client.pem"]), key=str(files["client.key"]))
        error = await refusal(ca=ca)
        if kind is Session:
            assert error.permanent, error

    broker.config.write_text(plain.replace(server, f"{server}cafile {ca}\nrequire_certificate true\n"))
    broker.start()
    go(mutual())
    gc.collect()


@pytest.mark.connected
@pytest.mark.parametrize("answer", [b"\x20\x02\x00\x01", b""], ids=["says-so", "closes"])
def test_a_broker_of_mqtt_3_1_1_is_found_out(mosquitto: Start, answer: bytes) -> None:
    broker = mosquitto()

    def only_old(first: bytes) -> bytes | None:
        level = first[first.index(b"MQTT") + 4]
        return None if level == 4 else answer

    async def main() -> None:
        async with Proxy(broker.port, only_old) as proxy:
            bus = connect(f"mqtt://127.0.0.1:{proxy.port}", client_id="me")
            async with bus:
                assert isinstance(bus, Negotiated)
                assert isinstance(bus.bus, Legacy)
                subscription = await bus.subscribe(["v"])
                await (await bus.publish(numbers(3)))
                assert sequence(await collect(subscription, 3)) == [0, 1, 2]
                proxy.cut()
                await until(lambda: not bus.connected)
                await until(lambda: bus.connected)
        async with connect(url(broker)) as new:
            assert isinstance(new, Negotiated)
            assert isinstance(new.bus, Session)

    go(main())


@KINDS
@pytest.mark.slow
def test_a_link_that_breaks_again_and_again_is_tried_again_soon(kind: type[Session | Legacy]) -> None:
    """Each time before it counts as steady. With pauses that only double, the twelfth would come after a minute or two."""

    async def main() -> None:
        async with (
            EmbeddedBroker() as broker,
            Proxy(int(broker.addresses[0].rpartition(":")[2])) as proxy,
            kind(f"mqtt://127.0.0.1:{proxy.port}") as bus,
            asyncio.timeout(30),
        ):
            for _ in range(12):
                await until(lambda: bus.connected, 30)
                proxy.cut()
                await until(lambda: not bus.connected, 30)
            await until(lambda: bus.connected, 30)

    go(main())


def test_nobody_there() -> None:
    async def main() -> None:
        for kind in (Session, Legacy):
            with pytest.raises(ConnectError) as caught:
                await kind("mqtt://127.0.0.1:1", Options(patience=0.2, backoff=0.05)).open()
            assert not caught.value.permanent
        bus = connect("mqtt://127.0.0.1:1", patience=0.2)
        with pytest.raises(ConnectError):
            await bus.open()
        task = asyncio.create_task(Session("mqtt://127.0.0.1:1").open())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    go(main())


@pytest.mark.connected
def test_qos_2_of_a_foreign_publisher(shared_mosquitto: Mosquitto) -> None:
    async def main() -> None:
        async with Session(url(shared_mosquitto)) as new, Legacy(url(shared_mosquitto)) as old:
            # our subscriptions ask for QoS 1 at most, but for who asks for 2 by itself
            subscriptions = [await bus.subscribe(["qos2"], qos=2) for bus in (new, old)]
            for i in range(3):
                process = await asyncio.create_subprocess_exec(
                    "mosquitto_pub", "-p", str(shared_mosquitto.port), "-t", "qos2", "-m", str(i), "-q", "2"
                )
                assert await process.wait() == 0
            for subscription in subscriptions:
                got = await collect(subscription, 3)
                assert [(d.qos, d.payload) for d in got] == [(got[0].qos, b"0"), (got[0].qos, b"1"), (got[0].qos, b"2")]
                await nothing(subscription)

    go(main())


def test_options_are_checked_by_connect() -> None:
    with pytest.raises(ConfigError):
        connect("mqtt://h", keep_alive=99999)
    assert connect("local:x", will=Will("a", b"")).encoded is False
