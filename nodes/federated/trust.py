"""Whom each side of a job knows: its own key, and the public keys of the others. Without any, everybody is believed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nodes.privacy.keys import Signer


@dataclass(frozen=True, slots=True)
class ClientTrust:
    """What a client goes by.

    :param signer: the device's identity; None: it signs nothing.
    :param coordinator: the coordinator's public key (Ed25519, 32 bytes); None: what it says is believed without a signature.
    :param devices: client's name → public key of the device, for secure sums; None: the coordinator is believed about them.
    """

    signer: Signer | None = None
    coordinator: bytes | None = None
    devices: Mapping[str, bytes] | None = None


@dataclass(frozen=True, slots=True)
class CoordinatorTrust:
    """What a coordinator goes by.

    :param signer: its identity, with which its calls and models are signed; None: they are not.
    :param devices: client's name → public key of its device; others take no part, and what they did not sign is refused.
        None: anybody may take part.
    """

    signer: Signer | None = None
    devices: Mapping[str, bytes] | None = None


CLIENT, COORDINATOR = ClientTrust(), CoordinatorTrust()
"""Those of a job without keys."""
