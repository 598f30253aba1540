"""Blobs over real buses and brokers: cut, killed, slow and dropping ones."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

import pytest
from bus_site import Mosquitto, Proxy, Run, Site, until

from broker.blob_format import Ack, BlobError, Chunk, Offer, chunk_size, offer
from broker.blob_hold import Hold, Memory
from broker.blob_pace import MOST_WINDOW
from broker.blob_port import fetch, receive, send, serving
from broker.blob_send import Outgoing
from broker.blob_store import BlobStore
from broker.bus import Publication
from broker.embedded.limits import Limits
from broker.embedded.server import EmbeddedBroker
from broker.session import Session
from broker.session_options import Options
from nodes.drill.proxy import Link

ROOT = Path(__file__).parents[2]
MOST = 64 << 20


def content(size: int, seed: int = 0) -> bytes:
    return Random(seed).randbytes(size)


def memory(offer: Offer) -> Hold:
    return Memory(offer, MOST)


def data_of(hold: Hold) -> memoryview:
    assert isinstance(hold, Memory)
    return hold.data


@pytest.mark.parametrize("size", [0, 10_000, 2_000_000])
def test_from_one_to_one(run: Run, size: int) -> None:
    data = content(size)

    async def scenario(site: Site) -> None:
        there, here = await site.open(), await site.open()
        got, out = await asyncio.gather(receive(here, site.topic("up"), memory), send(there, site.topic("up"), data))
        assert data_of(got) == data
        assert out.sent >= out.offer.count
        got, out = await asyncio.gather(  # the same topic, another blob
            receive(here, site.topic("up"), memory), send(there, site.topic("up"), data[:-1] + b"!", pace=out.pace)
        )
        assert bytes(data_of(got)) == data[:-1] + b"!"

    run(scenario)


def test_from_one_to_many_and_from_a_store_to_stores(run: Run, tmp_path: Path) -> None:
    data = content(1_500_000)

    async def scenario(site: Site) -> None:
        lead, first = await site.open(), await site.open()
        with BlobStore(tmp_path / "lead", MOST) as store:
            early = asyncio.create_task(fetch(first, site.topic("model"), memory))
            with store.open(store.put(data)) as blob:
                async with serving(lead, site.topic("model"), blob, push=4) as out:
                    stores = [BlobStore(tmp_path / str(i), MOST) for i in range(3)]
                    buses = [await site.open() for _ in stores]
                    got = await asyncio.gather(
                        *(fetch(bus, site.topic("model"), s.partial) for bus, s in zip(buses, stores, strict=True))
                    )
                    assert data_of(await early) == data
                    assert out.sent < 4 * out.offer.count  # one each would be four times
                    again = await fetch(buses[0], site.topic("model"), stores[0].partial)
                    assert again.whole  # it is there already: nothing is asked for
            for hold, each in zip([*got, again], [*stores, stores[0]], strict=True):
                hold.close()
                with each.open(hold.offer.digest) as there:
                    assert there.view() == data
            for each in stores:
                each.close()

    run(scenario)


def test_garbage_and_offers_of_others_do_no_harm(run: Run) -> None:
    data = content(400_000)
    wanted = offer(data, 4096)

    async def scenario(site: Site) -> None:
        there, here, bad = await site.open(), await site.open(), await site.open()
        topic = site.topic("up")

        async def disturb() -> None:
            junk = [b"", b"\xc1", b"\x93abc", bytes(70_000), Ack(wanted.digest, 1 << 30).encode()]
            junk.append(Chunk(wanted.digest, 1 << 39, memoryview(b"x")).encode())
            junk.append(Chunk(wanted.digest, 3, memoryview(b"short")).encode())
            junk.append(Chunk("0" * 64, 3, memoryview(b"other")).encode())
            for _ in range(20):
                for payload in junk:
                    parts = [Publication(f"{topic}/{part}", payload) for part in ("chunk", "ack")]
                    await bad.publish([*parts, Publication(f"{topic}/offer", payload[:50])])
                await asyncio.sleep(0.001)

        got, out, _ = await asyncio.gather(
            receive(here, topic, memory), send(there, topic, data, chunk=4096), disturb()
        )
        assert data_of(got) == data
        assert out.done

    run(scenario)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Offer("0" * 64, MOST + 1), "too-big"),
        (Offer("0" * 64, 1 << 39, 256), "bad-offer"),
        (Offer("../../etc/passwd", 10), "bad-offer"),
        (Offer("0" * 64, 100, 0), "bad-offer"),
    ],
)
def test_a_bad_offer_is_refused_with_its_reason(run: Run, bad: Offer, reason: str) -> None:
    async def scenario(site: Site) -> None:
        there, here = await site.open(), await site.open()
        heard = await there.subscribe([site.topic("up/ack")], qos=1)
        task = asyncio.create_task(receive(here, site.topic("up"), memory))
        hello = await heard.receive()
        heard.acknowledge(hello)
        assert Ack.decode(hello[0].payload).digest == ""
        await there.publish([Publication(site.topic("up/offer"), bad.encode())])
        answers = await heard.receive()
        heard.acknowledge(answers)
        assert Ack.decode(answers[0].payload).refused == reason
        with pytest.raises(BlobError) as caught:
            await task
        assert caught.value.reason == reason

    run(scenario)


def test_the_sender_is_told_that_it_is_refused(run: Run) -> None:
    async def scenario(site: Site) -> None:
        there, here = await site.open(), await site.open()
        results = await asyncio.gather(
            receive(here, site.topic("up"), lambda it: Memory(it, 1000)),
            send(there, site.topic("up"), bytes(1001)),
            return_exceptions=True,
        )
        assert [r.reason for r in results if isinstance(r, BlobError)] == ["too-big", "refused"]

    run(scenario)


def test_a_corrupted_chunk_costs_a_second_time(run: Run) -> None:
    data = content(100_000)
    wanted = offer(data, 4096)

    async def scenario(site: Site) -> None:
        there, here = await site.open(), await site.open()
        topic = site.topic("up")
        spoiled: list[int] = []

        def hold(it: Offer) -> Hold:
            found = Memory(it, MOST)
            found.write(2, memoryview(b"?" * 4096))  # as if the wire had changed it
            first = found.finish

            def finish() -> bool:
                spoiled.append(1)
                return first()

            found.finish = finish  # type: ignore[method-assign] # to count
            return found

        got, out = await asyncio.gather(receive(here, topic, hold), send(there, topic, data, chunk=4096))
        assert data_of(got) == data
        assert len(spoiled) == 2
        assert out.sent >= 2 * wanted.count - 1

    run(scenario)


RECEIVER = """
import asyncio, sys
from pathlib import Path
from broker.blob_port import receive
from broker.blob_store import BlobStore
from broker.connect import connect
async def main():
    with BlobStore(Path(sys.argv[2]), 1 << 30) as store:
        async with connect(sys.argv[1]) as bus:
            hold = await receive(bus, "up", store.partial)
            hold.close()
            print(hold.offer.digest, flush=True)
asyncio.run(main())
"""


def there_of_it(folder: Path) -> int:
    """Chunks that a receiver in another process has put on its disk."""
    try:
        return sum(byte.bit_count() for path in folder.glob("*.map") for byte in path.read_bytes())
    except OSError:
        return 0


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["embedded", "mosquitto"])
def test_a_receiver_that_is_killed_goes_on_where_it_was(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    data = content(3_000_000)
    fixed: Mosquitto | None = request.getfixturevalue("shared_mosquitto") if kind == "mosquitto" else None
    folder = tmp_path / "store"

    async def transfer(port: int) -> Outgoing:
        async with Link(f"mqtt://127.0.0.1:{port}") as link:
            link.bandwidth = 1_000_000  # so that there is a middle to be killed in

            def start() -> subprocess.Popen[str]:
                return subprocess.Popen(
                    [sys.executable, "-c", RECEIVER, link.url, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
                )

            async with Session(f"mqtt://127.0.0.1:{port}") as bus:
                sending = asyncio.create_task(send(bus, "up", data, chunk=16_384))
                for part in (0.2, 0.5, 0.8):
                    with start() as process:
                        await until(lambda part=part: there_of_it(folder) > part * 3_000_000 / 16_384, 40)  # type: ignore[misc] # mypy knows no default arguments of lambdas
                        process.kill()
                with start() as process:
                    said, _ = await asyncio.to_thread(process.communicate)
                    assert said.split() == [offer(data).digest]
                return await sending

    async def main() -> Outgoing:
        async with asyncio.timeout(110):
            if fixed is not None:
                return await transfer(fixed.port)
            async with EmbeddedBroker() as broker:
                return await transfer(broker.port)

    out = asyncio.run(main())
    with BlobStore(folder, MOST) as store, store.open(out.offer.digest) as blob:
        assert blob.view() == data
    assert out.sent <= out.offer.count + 3 * 4 * MOST_WINDOW  # what was under way at each kill, and asked into the void


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.connected
def test_a_broker_that_drops(mosquitto: Callable[..., Mosquitto]) -> None:
    """Far more than its queue and the sockets hold is published while a reader stands still."""
    data = content(30_000_000)
    broker = mosquitto("max_queued_messages 5", "max_inflight_messages 2")

    async def main() -> tuple[int, int]:
        url = f"mqtt://127.0.0.1:{broker.port}"
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(asyncio.timeout(100))
            proxy = await stack.enter_async_context(Proxy(broker.port))
            urls = (url, url, f"mqtt://127.0.0.1:{proxy.port}")
            lead, near, away = [await stack.enter_async_context(Session(each)) for each in urls]
            task = asyncio.create_task(fetch(away, "model", memory))
            await asyncio.sleep(0.1)  # it subscribes; if it has not yet, it only misses more
            proxy.stall()
            async with serving(lead, "model", data, push=1 << 20) as out:
                assert data_of(await fetch(near, "model", memory)) == data
                before = out.sent
                proxy.go_on()
                assert data_of(await task) == data
                return before, out.sent

    near, all_ = asyncio.run(main())
    assert all_ > near >= offer(data).count


@pytest.mark.campaign
@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", ["embedded", "mosquitto"])
def test_400_kib_through_32_kib_a_second_with_a_keep_alive_of_5_seconds(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """As one message it never arrives: pings wait behind it and the link counts as dead."""
    data = content(400 * 1024)
    rate, alive = 32 * 1024, 5
    size = chunk_size(rate=rate, keep_alive=alive)
    assert size == 40 * 1024
    fixed: Mosquitto | None = request.getfixturevalue("shared_mosquitto") if kind == "mosquitto" else None
    lost: list[str] = []

    def state(name: str, reason: str) -> None:
        if name != "connected":
            lost.append(reason)

    async def transfer(port: int) -> tuple[Hold, Outgoing, float]:
        async with Link(f"mqtt://127.0.0.1:{port}") as link:
            link.bandwidth = rate
            slow = Session(link.url, Options(keep_alive=alive, on_state=state))
            async with slow, Session(f"mqtt://127.0.0.1:{port}") as bus:
                began = time.monotonic()
                got, out = await asyncio.gather(receive(bus, "slow", memory), send(slow, "slow", data, chunk=size))
                return got, out, time.monotonic() - began

    async def main() -> tuple[Hold, Outgoing, float]:
        async with asyncio.timeout(170):
            if fixed is not None:
                return await transfer(fixed.port)
            async with EmbeddedBroker() as broker:
                return await transfer(broker.port)

    got, out, seconds = asyncio.run(main())
    assert data_of(got) == data
    assert [why for why in lost if why != "closed"] == []
    assert seconds >= 12
    assert out.sent <= out.offer.count + 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embedded", "mosquitto"])
def test_a_link_that_is_cut_again_and_again(kind: str, request: pytest.FixtureRequest) -> None:
    data = content(6_000_000)
    fixed: Mosquitto | None = request.getfixturevalue("shared_mosquitto") if kind == "mosquitto" else None

    async def transfer(port: int) -> tuple[Hold, Outgoing, int]:
        async with Link(f"mqtt://127.0.0.1:{port}") as link:
            link.bandwidth = 8_000_000
            options = Options(backoff=0.02)
            async with Session(link.url, options) as there, Session(link.url, options) as here:
                tasks = (
                    asyncio.create_task(receive(here, "cut", memory)),
                    asyncio.create_task(send(there, "cut", data, chunk=16_384)),
                )
                cuts = 0
                while not all(task.done() for task in tasks):
                    await asyncio.sleep(0.15)
                    if cuts < 5:
                        cuts += 1
                        link.cut()
                return tasks[0].result(), tasks[1].result(), cuts

    async def main() -> tuple[Hold, Outgoing, int]:
        async with asyncio.timeout(50):
            if fixed is not None:
                return await transfer(fixed.port)
            async with EmbeddedBroker() as broker:
                return await transfer(broker.port)

    got, out, cuts = asyncio.run(main())
    assert data_of(got) == data
    assert cuts == 5
    assert out.sent <= out.offer.count + 2 * MOST_WINDOW * cuts


STREAM = """
import asyncio, resource, sys
from pathlib import Path
from broker.blob_port import receive, send
from broker.blob_store import BlobStore
from broker.embedded.limits import Limits
from broker.embedded.server import EmbeddedBroker
from broker.session import Session
async def main():
    with BlobStore(Path(sys.argv[1]), 1 << 30) as here, BlobStore(Path(sys.argv[2]), 1 << 30, durable=False) as there:
        async with EmbeddedBroker() as broker:
            async with Session(f"mqtt://127.0.0.1:{broker.port}") as a, Session(f"mqtt://127.0.0.1:{broker.port}") as b:
                for digest in sys.argv[3:]:
                    with here.open(digest) as blob:
                        hold, out = await asyncio.gather(receive(b, "big", there.partial), send(a, "big", blob))
                        hold.close()
                    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
asyncio.run(main())
"""


@pytest.mark.slow
def test_a_large_blob_streams_without_growing_memory(tmp_path: Path) -> None:
    """From disk through a broker to disk, all in one process: as much memory for 200 MB as for 5."""
    small, large = content(5_000_000), content(10_000_000) * 20
    with BlobStore(tmp_path / "a", 1 << 30, durable=False) as store:
        digests = [store.put(small), store.put(large)]
    ran = subprocess.run(
        [sys.executable, "-c", STREAM, str(tmp_path / "a"), str(tmp_path / "b"), *digests],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = (int(line) for line in ran.stdout.split())
    assert after - before < 20_000  # KB
    with BlobStore(tmp_path / "b", 1 << 30) as store:
        assert store.audit() == []
        assert set(store.digests()) == set(digests)


def test_chunks_fit_the_brokers_largest_packet() -> None:
    data = content(200_000)

    async def main() -> Outgoing:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(asyncio.timeout(50))
            broker = await stack.enter_async_context(EmbeddedBroker(limits=Limits(packet_bytes=20_000)))
            there, here = [await stack.enter_async_context(Session(broker.url)) for _ in range(2)]
            got, out = await asyncio.gather(receive(here, "line/up", memory), send(there, "line/up", data))
            assert data_of(got) == data
            async with serving(there, "line/model", data) as many:
                assert data_of(await fetch(here, "line/model", memory)) == data
                assert many.offer.chunk == out.offer.chunk
            return out

    out = asyncio.run(main())
    assert out.offer.chunk == 18 * 1024
    assert out.sent == out.offer.count
