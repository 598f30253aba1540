"""A connection of a node's or a relay's to one broker: patient for ever, and said once when it is gone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from broker.bus import Bus, Will
from nodes import log
from nodes.assignment import Broker


def link(
    at: Broker,
    client_id: str,
    *,
    up: Callable[[], None],
    down: Callable[[], None] | None = None,
    will: Will | None = None,
    **told: Any,
) -> Bus:
    """A bus, not opened yet.

    :param up: called each time that the link is there; ``down``: when it is not, also at every failed attempt.
    :param told: what the log says beside the reason, such as the node's name.
    """
    from broker.connect import connect

    last = ""

    def changed(state: str, reason: str) -> None:
        nonlocal last
        if state == "connected":
            last = ""
            log.debug("connected", reason=reason, **told)
            up()
            return
        if down is not None:
            down()
        if reason != last:  # said once, however often it is tried again
            last = reason
            log.warning(state, reason=reason, **told)

    return connect(
        at.url,
        client_id=client_id,
        user=at.user,
        password=at.password,
        ca=at.ca,
        cert=at.cert,
        key=at.key,
        will=will,
        patience=math.inf,  # nobody is there to start us again when the broker comes back
        on_state=changed,
    )
