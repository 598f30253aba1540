"""Brokers that the nodes reach through links that can be broken."""

from __future__ import annotations

from pathlib import Path

from nodes.brokers import Brokers
from nodes.drill.proxy import Link
from nodes.plan import Plan


def unlinkable(url: str) -> str | None:
    """Why no link can stand before a broker, or None."""
    if url.startswith(("mqtts:", "wss:", "mqtt3s:")):
        return "TLS: its certificate is not for the address of a proxy"
    return None


class Behind(Brokers):
    """The brokers of a plan, each behind a :class:`Link` where one can be; takes the place of a supervisor's ``brokers``.

    :ivar links: by broker, known after :meth:`start`.
    :ivar direct: name → url without the link.
    """

    def __init__(self, plan: Plan, state: Path, host: str | None, seed: int = 0) -> None:
        super().__init__(plan, state, host)
        self.links: dict[str, Link] = {}
        self.direct: dict[str, str] = {}
        self._seed = seed

    async def start(self) -> None:
        await super().start()
        self.direct = dict(self.urls)
        for name, url in self.direct.items():
            if unlinkable(url) is None:
                link = self.links[name] = Link(url, self._seed)
                await link.__aenter__()
                self.urls[name] = link.url

    def _up(self, name: str) -> None:
        super()._up(name)
        if name in self.links:  # it was started again: nodes that are too must not go round the link
            self.direct[name] = self.urls[name]
            self.urls[name] = self.links[name].url

    async def stop(self) -> None:
        await super().stop()
        for link in self.links.values():
            await link.__aexit__()
