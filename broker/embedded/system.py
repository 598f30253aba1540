"""The broker's own topics, ``$SYS/broker/…``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.embedded.messages import Message, make

if TYPE_CHECKING:
    from broker.embedded.core import Core

EVERY_SECONDS = 10.0


class System:
    """Publishes the broker's counts, retained, every ten seconds while somebody subscribes to ``$SYS/…``."""

    def __init__(self, core: Core, now: float) -> None:
        self._core = core
        self._start = now
        self._last = -1.0
        self._running = False
        self._version = ""

    def values(self, now: float) -> dict[str, str]:
        """Topic below ``$SYS/broker/`` -> value, as text."""
        core, stats = self._core, self._core.stats
        if not self._version:
            from importlib.metadata import PackageNotFoundError, version  # slow, and seldom needed

            try:
                self._version = version("penstock")
            except PackageNotFoundError:  # run from a tree that is not installed
                self._version = "unknown"
        return {
            "version": f"penstock {self._version}",
            "uptime": str(int(now - self._start)),
            "clients/connected": str(stats.connected),
            "clients/total": str(len(core.entrance.sessions)),
            "subscriptions/count": str(core.router.subscriptions.count),
            "retained messages/count": str(len(core.router.retained)),
            "messages/received": str(stats.received),
            "messages/sent": str(stats.sent),
            "messages/dropped": str(stats.dropped),
            "messages/refused": str(stats.refused),
            "messages/expired": str(stats.expired),
        }

    def refresh(self, now: float) -> None:
        """Have present values retained, and publish them from now on. Called when a client subscribes to ``$SYS`` topics."""
        if now != self._last:
            self._last = now
            for message in self._messages(now):
                self._core.router.retained.put(message)
        if not self._running:
            self._running = True
            self._core.timers.at(now + EVERY_SECONDS, self._publish)

    def _publish(self, now: float) -> None:
        self._running = bool(self._core.router.subscriptions.system)
        if self._running:
            self._last = now
            for message in self._messages(now):
                self._core.router.publish(message, None, now)
            self._core.timers.at(now + EVERY_SECONDS, self._publish)

    def _messages(self, now: float) -> list[Message]:
        return [
            make(f"$SYS/broker/{name}", value.encode(), now, retain=True) for name, value in self.values(now).items()
        ]
