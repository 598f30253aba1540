"""The disk with the run's state is full for a while.

As root the state stands on a small tmpfs, in a mount namespace of this process, and a file fills it. Otherwise no file of the
node processes can grow (RLIMIT_FSIZE 0): their writes fail likewise, with EFBIG in place of ENOSPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
from pathlib import Path

from nodes.drill.fault import Blow, Ground, Stage

SECONDS = 4.0
SIZE = 64 * 1024 * 1024
"""Bytes of the tmpfs: room for the journals, and soon full."""
_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE = 16384, 1 << 18
_MNT_DETACH = 2
_CAP_SYS_ADMIN = 21
_FILLER = "filler"


def why_not(ground: Ground) -> str | None:
    """It can always be done, one way or the other."""
    return None if ground.nodes else "no node runs here"


def targets(ground: Ground) -> list[str]:
    """The one state folder."""
    del ground
    return [""]


def can_mount() -> bool:
    """Whether this process may mount a file system."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        (held,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")]
    except (OSError, ValueError):
        return False
    return bool(held >> _CAP_SYS_ADMIN & 1)


def prepare(stage: Stage) -> None:
    """Put a tmpfs where the state will be, if we may. It goes with the process's mount namespace, whatever ends us."""
    stage.state.mkdir(parents=True, exist_ok=True)
    if can_mount() and mount(stage.state):
        stage.bounded = "tmpfs"


def finish(stage: Stage) -> None:
    """The tmpfs goes, so that the folder below it can."""
    if stage.bounded:
        ctypes.CDLL(None).umount2(os.fsencode(stage.state.resolve()), _MNT_DETACH)


def mount(folder: Path) -> bool:
    """A tmpfs of :data:`SIZE` at ``folder``, seen by this process and its children only; whether that worked."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0 or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        return False
    options = f"size={SIZE},mode=0755".encode()
    return bool(libc.mount(b"none", os.fsencode(folder.resolve()), b"tmpfs", 0, options) == 0)


async def strike(stage: Stage, blow: Blow) -> str:
    """Fill it, wait, make room again."""
    if stage.bounded:
        filler = stage.state / _FILLER
        try:
            fill(filler)
            await asyncio.sleep(blow.seconds)
        finally:
            filler.unlink(missing_ok=True)
        return f"{blow.seconds:.1f} s, a tmpfs of {SIZE >> 20} MiB"
    pids = {stage.supervisor.views[name].pid for name in stage.ground.nodes if name in stage.supervisor.views}
    held = {pid: limits for pid in pids if pid and (limits := limit(pid, 0)) is not None}
    try:
        await asyncio.sleep(blow.seconds)
    finally:
        for pid, (soft, _) in held.items():
            limit(pid, soft)
    return f"{blow.seconds:.1f} s, no file may grow (RLIMIT_FSIZE)"


def fill(path: Path) -> None:
    """Write until no byte is left."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1 << 8, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size):
                    pass


def limit(pid: int, most: int) -> tuple[int, int] | None:
    """Set a process's largest file (soft limit, bytes); the limits before, None if it is gone."""
    try:
        soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, hard))
    except (ProcessLookupError, PermissionError):
        return None
    return soft, hard
