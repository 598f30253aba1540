"""Counts of the broker, published under ``$SYS/broker``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Stats:
    """Since the start of the broker.

    :param received: PUBLISH packets taken from clients.
    :param sent: PUBLISH packets written to clients.
    :param dropped: messages that a subscriber did not get: QoS 0 for a slow reader, too large for the client, no room for
        retained ones, a will or 3.1.1 publication for a full session.
    :param refused: publications answered with an error (rights, quota, topic, payload format).
    :param expired: messages that expired in a queue.
    :param connected: clients connected now.
    :param connections: connections since the start.
    :param queued: bytes of the messages with QoS > 0 (and of those waiting behind them) that all sessions have now.
    """

    received: int = 0
    sent: int = 0
    dropped: int = 0
    refused: int = 0
    expired: int = 0
    connected: int = 0
    connections: int = 0
    queued: int = 0
