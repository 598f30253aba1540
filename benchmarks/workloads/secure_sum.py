"""What a secure sum costs one client and the coordinator: 10, 100 and 1,000 clients, 10⁴ to 10⁶ numbers, a tenth of them lost.

All clients do all that the coordinator needs of them; masks, which cost what the numbers are many, are made and timed for a few
clients only (the coordinator adds up anything). A thousand clients have neighbours (SecAgg+), fewer share with all others.
"""

from __future__ import annotations

import hashlib
import time
from statistics import median

import numpy as np

from benchmarks import figures
from benchmarks.contestants import CannotError
from benchmarks.figures import Figure

CLIENTS = (10, 100, 1000)
SIZES = (10_000, 100_000, 1_000_000)
_TIMED = 3
_SECOND = 1000.0


def _one(count: int, size: int) -> dict[str, float]:
    """ms of one client and of the coordinator, kB up and down of one client, ms of the plain sum."""
    from nodes.privacy.keys import Signer
    from nodes.privacy.secure_sum import Client, Server, Terms, degree_for
    from nodes.privacy.secure_terms import Inbox, hear, pack

    degree = degree_for(count, 0.5, 0.1, 0.05) if count >= 1000 else 0
    terms = Terms("cost", 1, 1, size, count, 1.0, 1000, threshold=0.5 if degree else 2 / 3, degree=degree)
    signers = {f"c{i:05}": Signer() for i in range(count)}
    devices, coordinator = {name: signer.public for name, signer in signers.items()}, Signer()
    names = list(signers)
    alive, timed = names[count // 10 :], names[-_TIMED:]
    spent = dict.fromkeys(names, 0.0)
    up, down, serving = 0, 0, 0.0

    def ours(name: str, began: float) -> None:
        spent[name] += time.perf_counter() - began

    clients = {}
    for name in names:
        began = time.perf_counter()
        clients[name] = Client(name, terms, signer=signers[name], coordinator=coordinator.public, devices=devices)
        clients[name].keys()
        ours(name, began)
    server = Server(terms, signer=coordinator, devices=devices)
    keys = [client.keys() for client in clients.values()]
    began = time.perf_counter()
    for key in keys:
        server.key(key)
    roster = server.roster()
    serving += time.perf_counter() - began
    shared = []
    for name in names:
        began = time.perf_counter()
        shared.append(clients[name].share(roster))
        ours(name, began)
    began = time.perf_counter()
    for payload in shared:
        server.share(payload)
    inboxes = server.inboxes()
    serving += time.perf_counter() - began
    values = np.random.default_rng(0).uniform(-1, 1, size).astype(np.float32)
    vector = np.zeros(size + 1, np.uint32)
    for name in alive:
        client = clients[name]
        if name in timed:
            began = time.perf_counter()
            vector = client.mask(inboxes[name], values, 100)
            ours(name, began)
        else:  # what mask() does without its masks
            inbox = hear(inboxes[name], Inbox, coordinator.public)
            state = client._state
            assert state.roster is not None  # noqa: S101 - it has shared
            state.held = client._opened(inbox, state.roster)
            state.inbox = hashlib.sha256(pack(inbox)).digest()
    began = time.perf_counter()
    for name in alive:
        server.masked(name, vector)
    adding = time.perf_counter() - began
    began = time.perf_counter()
    survivors = server.survivors()
    serving += adding + time.perf_counter() - began
    revealed = []
    for name in alive:
        began = time.perf_counter()
        revealed.append(clients[name].reveal(survivors))
        ours(name, began)
    began = time.perf_counter()
    for payload in revealed:
        server.reveal(payload)
    server.total()
    serving += time.perf_counter() - began
    up = len(keys[-1]) + len(shared[-1]) + vector.nbytes + len(revealed[-1])
    down = len(roster) + len(inboxes[names[-1]]) + len(survivors)
    return {
        "client": median(spent[name] for name in timed) * _SECOND,
        "coordinator": serving * _SECOND,
        "plain": adding * _SECOND,
        "up": up / 1000,
        "down": down / 1000,
    }


def measure() -> list[Figure]:
    """All figures of this file."""
    try:
        import cryptography  # noqa: F401 - is it there?
    except ImportError:
        raise CannotError("cryptography is not installed") from None
    units = {"client": "ms", "coordinator": "ms", "plain": "ms", "up": "kB", "down": "kB"}
    words = {
        "client": "a client",
        "coordinator": "the coordinator",
        "plain": "the coordinator, adding alone",
        "up": "up, a client",
        "down": "down, a client",
    }
    out = []
    for count in CLIENTS:
        for size in SIZES:
            runs = [_one(count, size) for _ in range(figures.ROUNDS if count < 1000 else 1)]
            for what, unit in units.items():
                name = f"secure sum, {count:,} clients, {size:,} numbers: {words[what]}"
                out.append(Figure(name, unit, tuple(run[what] for run in runs)))
    return out
