"""One attempt to connect a :class:`broker.session.Session`, and what its failure means."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import mqtt5

from broker.session_inbox import ALIASES
from broker.session_link import Link, MalformedError
from broker.session_options import Address, Options
from schemas.errors import ConnectError

UNSUPPORTED_VERSION = 132
"""CONNACK reason code of a broker that does not speak MQTT 5; also given for an answer in MQTT 3.1.1."""

PERMANENT = frozenset({129, 130, 132, 133, 134, 135, 138, 140, 144, 149, 153, 154, 155})
"""CONNACK reason codes that another attempt would get again."""


class SilentError(ConnectError):
    """The broker took the connection and closed it without an answer, as some do with a protocol they do not know."""


async def reach(
    link: Link, address: Address, options: Options, context: ssl.SSLContext | None, hello: bytes, timeout: float
) -> None:
    """Connect ``link``, send ``hello`` and wait until the broker has answered or closed.

    :param timeout: seconds for all of it.
    :raises ConnectError: there was no answer.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout):
            if address.scheme == "unix":
                await loop.create_unix_connection(lambda: link, address.path)
            else:
                await loop.create_connection(lambda: link, address.host, address.port, ssl=context)
            link.write(hello)
            either: list[asyncio.Future[Any]] = [link.answered, link.lost]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    except TimeoutError:
        link.abort("timeout")
        raise ConnectError(f"{address}: no answer within {timeout:.3g} s") from None
    except ssl.SSLCertVerificationError as error:
        raise ConnectError(f"{address}: certificate refused: {error.verify_message}", permanent=True) from error
    except ssl.SSLError as error:
        raise ConnectError(f"{address}: TLS: {error.reason or error}", permanent=True) from error
    except OSError as error:
        raise ConnectError(f"{address}: {error.strerror or error}") from error
    except BaseException:
        link.abort("cancelled")
        raise
    if link.answered.done():
        return
    if link.old:
        raise ConnectError(f"{address}: speaks MQTT 3.1.1 only", code=UNSUPPORTED_VERSION, permanent=True)
    if isinstance(link.error, ssl.SSLError):  # TLS 1.3: our certificate is refused after the handshake
        raise ConnectError(f"{address}: TLS: {link.error.reason or link.error}", permanent=True)
    if isinstance(link.error, MalformedError):
        raise ConnectError(f"{address}: {link.reason}", permanent=True)
    raise SilentError(f"{address}: {link.reason} before answering")


def hello(client_id: str, options: Options, *, fresh: bool) -> bytes:
    """The CONNECT packet.

    :raises ConnectError: it cannot be encoded (a name that is too long).
    """
    will = options.will
    try:
        return mqtt5.ConnectPacket(
            client_id,
            username=options.user,
            password=None if options.password is None else options.password.encode(),
            clean_start=fresh,
            will=None
            if will is None
            else mqtt5.Will(
                will.topic,
                payload=will.payload,
                qos=mqtt5.QoS(will.qos),
                retain=will.retain,
                will_delay_interval=will.delay,
            ),
            keep_alive=options.keep_alive,
            session_expiry_interval=options.session_expiry,
            receive_max=options.receive_maximum,
            topic_alias_max=ALIASES,
            max_packet_size=options.max_packet_size,
        ).write()
    except (ValueError, TypeError, OverflowError) as error:
        raise ConnectError(f"cannot introduce ourselves: {error}", permanent=True) from error


def check(connack: mqtt5.ConnAckPacket, address: Address) -> None:
    """:raises ConnectError: the broker refused."""
    code = connack.reason_code
    if code.value:
        said = f": {connack.reason_str}" if connack.reason_str else ""
        other = f" (it names {connack.server_reference})" if connack.server_reference else ""
        raise ConnectError(
            f"{address}: refused by the broker: {words(code)} ({code.value}){said}{other}",
            code=code.value,
            permanent=code.value in PERMANENT,
        )


# The codec's enumerations are not Python's: they are neither int nor false at zero. Compare ``.value``.


def words(
    code: mqtt5.ConnAckReasonCode | mqtt5.SubAckReasonCode | mqtt5.PubAckReasonCode | mqtt5.DisconnectReasonCode,
) -> str:
    """A reason code as a person reads it."""
    return code.name.lower().replace("_", " ")
