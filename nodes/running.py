"""A run tells where it can be reached: ``run.json`` in its state folder, there as long as it runs. It has the folder to itself.

``penstock tap``, ``ledger`` and ``dead`` find the brokers of a running topology by it, which may listen on any free port.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import IO

import msgspec

from schemas.errors import RunError

_NAME = "run.json"


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """What one supervisor runs.

    :param host: the host whose nodes it runs; ``""``: all.
    :param pid: the supervisor's process.
    :param brokers: name → url of the brokers that its nodes use; no secrets are in it.
    """

    topology: str
    host: str
    pid: int
    brokers: dict[str, str]


def hold(folder: Path, host: str, topology: str) -> IO[str]:
    """Take a state folder, for the run of a host's nodes or of all (``""``); it is given back when the file is closed.

    :raises RunError: another run has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / (f"{host}.lock" if host else "run.lock")).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        other = lock.read().strip()
        lock.close()
        raise RunError(f"{topology} is running already (process {other}); its state is in {folder}") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def announce(folder: Path, running: Running) -> None:
    """Write the file, readable by its owner only; called by the supervisor when its brokers are there."""
    path = _path(folder, running.host)
    fresh = path.with_name(f"{path.name}.{running.pid}")
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(msgspec.json.encode(running))
    fresh.replace(path)


def withdraw(folder: Path, host: str) -> None:
    """Remove the file; called when the run ends."""
    with contextlib.suppress(OSError):
        _path(folder, host).unlink()


def find(folder: Path) -> list[Running]:
    """What runs by a state folder: usually nothing or one, several where hosts are run one by one."""
    out = []
    for path in sorted(folder.glob(f"*{_NAME}")):
        try:
            running = msgspec.json.decode(path.read_bytes(), type=Running)
        except (OSError, msgspec.DecodeError):
            continue
        if _alive(running.pid):  # a killed supervisor leaves its file behind
            out.append(running)
    return out


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _path(folder: Path, host: str) -> Path:
    return folder / (f"{host}.{_NAME}" if host else _NAME)
