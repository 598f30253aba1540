"""The options by which a node of a job says who it is and whom it believes; and what they come to when it starts."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from nodes.federated import keyring
from nodes.federated.trust import ClientTrust, CoordinatorTrust
from nodes.operator import Context
from schemas.errors import ConfigError, Problem
from schemas.topology_parts import Secret

KEY = "this node's private key (penstock fl key): a file that only its owner may read, or {env: NAME}; without, it signs nothing"
COORDINATOR = (
    "public key of who leads the job, or a file with it: what it did not sign is passed over; without, all is believed"
)
DEVICES = (
    "public keys of the clients, others take no part: a folder of files NAME.pub, a file of lines NAME: KEY, or a map."
    " Everybody may if left out"
)


def _bare(value: Any) -> Any:
    return {"file": value} if isinstance(value, str) else value


Key = Annotated[Secret | None, BeforeValidator(_bare, json_schema_input_type=Secret | str | None)]


def check(
    context: Context,
    key: Secret | None = None,
    coordinator: str | None = None,
    devices: str | dict[str, str] | None = None,
) -> None:
    """Look at the files; an environment variable is looked at when the node starts, where it is.

    :raises ConfigError: all that is wrong with them, each at its option.
    """
    problems: list[Problem] = []

    def look(option: str, act: Any, *given: Any) -> None:
        try:
            act(*given)
        except ConfigError as error:
            problems.append(Problem((option,), str(error)))

    if key is not None and key.file is not None:
        look("key", keyring.read_private, context.path(key.file))
    if coordinator is not None:
        look("coordinator", public, coordinator, context)
    if devices is not None:
        look("devices", known, devices, context)
    if problems:
        raise ConfigError(*problems)


def private(key: Secret, context: Context) -> bytes:
    """The private key.

    :raises ConfigError: it is not where it should be.
    """
    if key.file is not None:
        return keyring.read_private(context.path(key.file))
    try:
        return keyring.private_of(key.read(context.base))
    except ConfigError as error:
        raise ConfigError(Problem(("key",), f"{key.env}: {error}")) from None


def own(key: Secret | None, context: Context) -> bytes | None:
    """The public key of a private one in a file; None: it has none, or it is in the environment.

    :raises ConfigError: it is not where it should be.
    :raises MissingError: the library is not installed.
    """
    if key is None or key.file is None:
        return None
    from nodes.privacy.keys import Signer

    return Signer(private(key, context)).public


def public(text: str, context: Context) -> bytes:
    """The coordinator's public key.

    :raises ConfigError: it is none.
    """
    if text.startswith((keyring.PUBLIC, keyring.PRIVATE)):
        return keyring.public_of(text)
    return keyring.read_public(context.path(text))


def known(devices: str | dict[str, str], context: Context) -> dict[str, bytes]:
    """The clients' public keys.

    :raises ConfigError: they are none.
    """
    return keyring.named(devices) if isinstance(devices, dict) else keyring.read_devices(context.path(devices))


def client_trust(key: Secret | None, coordinator: str | None, context: Context) -> ClientTrust:
    """As a client or a follower takes it.

    :raises ConfigError: a key is not where it should be.
    :raises MissingError: there are keys, and the library that computes with them is not installed.
    """
    if key is None and coordinator is None:
        return ClientTrust()
    from nodes.privacy.keys import Signer, require

    require()
    return ClientTrust(
        None if key is None else Signer(private(key, context)),
        None if coordinator is None else public(coordinator, context),
    )


def coordinator_trust(key: Secret | None, devices: str | dict[str, str] | None, context: Context) -> CoordinatorTrust:
    """As a coordinator takes it; it raises likewise."""
    if key is None and devices is None:
        return CoordinatorTrust()
    from nodes.privacy.keys import Signer, require

    require()
    return CoordinatorTrust(
        None if key is None else Signer(private(key, context)), None if devices is None else known(devices, context)
    )
