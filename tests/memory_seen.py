"""Who on this machine has which shared memory, as the kernel says. It never has a name, so without a holder it is free."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from broker.shared_memory import FOLDER


def rings(pid: int) -> set[int]:
    """Inodes of the shared memory that a process has mapped or open; none if it has ended."""
    found: set[int] = set()
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) > 5 and fields[5].startswith(f"{FOLDER}/#"):
                found.add(int(fields[4]))
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.readlink(fd).startswith(f"{FOLDER}/#"):
                    found.add(fd.stat().st_ino)
    return found


def holders(inodes: set[int]) -> list[int]:
    """Processes that have any of them."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if rings(pid) & inodes]
