"""The nursery: a process that has imported what every worker needs, and forks workers on request.

A worker made so starts in a few milliseconds and shares the memory of what was imported, where a new interpreter takes half a
second of a small computer's time and has everything once more. The nursery runs no event loop and no threads, so forking
it is sound. Started by the supervisor: ``python -m nodes.nursery FD [MODULE …]``; see :mod:`nodes.forks` for the other end.

On the socket FD (sequential packets): a request is a token with three descriptors, the worker's stdin, stdout and stderr; it
is answered with ``token pid``. A worker's end is told as ``pid status``, status as of ``os.waitstatus_to_exitcode``.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
from importlib import import_module
from typing import NoReturn

COMMON = (
    "numpy",
    "msgspec",
    "mqtt5",
    "pydantic",
    "nodes.worker",
    "nodes.options",
    "broker.connect",
    "broker.session_client",
)
"""What every worker imports. Kinds are imported by the worker itself, unless several of them use one."""


def main() -> NoReturn:
    """Entry of the process; ends when the supervisor closes the socket."""
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in (*COMMON, *sys.argv[2:]):
        import_module(name)
    gc.collect()
    gc.freeze()  # a fork's garbage collector leaves these objects alone, so their pages stay shared
    wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([control.fileno(), wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            _tell_ends(control)
        if control.fileno() in ready and not _fork(control, (wake, woken)):
            sys.exit(0)


def _fork(control: socket.socket, own: tuple[int, int]) -> bool:
    """Answer one request; False when the supervisor is gone. In the fork it does not return."""
    try:
        token, descriptors, _, _ = socket.recv_fds(control, 64, 3)
    except ConnectionError:  # it left with news of ours unread
        return False
    if not token:
        return False
    pid = os.fork()
    if pid == 0:
        control.close()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in own:
            os.close(descriptor)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        for descriptor in descriptors:
            if descriptor > 2:
                os.close(descriptor)
        from nodes.worker import main as work

        work()
    for descriptor in descriptors:
        os.close(descriptor)
    control.send(b"%s %d" % (token, pid))
    return True


def _tell_ends(control: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        control.send(b"%d %d" % (pid, os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main()
