"""From a URL to a bus."""

from __future__ import annotations

from collections.abc import Sequence

from broker.bus import Bus, Overflow, Publication, Receipt, Subscription, Will
from broker.local import LocalBus
from broker.session import Session
from broker.session_client import Client
from broker.session_dial import UNSUPPORTED_VERSION, SilentError
from broker.session_options import Address, OnState, Options, parse
from schemas.errors import ClosedError, ConfigError, ConnectError

LOCAL = "local:"


def connect(
    url: str,
    *,
    client_id: str = "",
    user: str | None = None,
    password: str | None = None,
    ca: str | None = None,
    cert: str | None = None,
    key: str | None = None,
    keep_alive: int = 30,
    session_expiry: int = 0,
    clean_start: bool | None = None,
    will: Will | None = None,
    receive_maximum: int = 1024,
    prompt: bool = False,
    patience: float = 30.0,
    on_state: OnState | None = None,
) -> Bus:
    """The bus for ``url``, not opened yet.

    ==========================================  =====================================================================
    ``mqtt://`` ``mqtts://`` ``unix:///path``   MQTT 5; MQTT 3.1.1 where the broker turns out to speak nothing newer
    ``mqtt3://`` ``mqtt3s://``                  MQTT 3.1.1
    ``ws://`` ``wss://``                        MQTT 3.1.1 over WebSockets
    ``local:name``                              the in-process hub of that name
    ==========================================  =====================================================================

    The parameters are those of :class:`broker.session_options.Options`.

    :raises ConfigError: the URL or an option is wrong.
    """
    options = Options(
        client_id=client_id,
        user=user,
        password=password,
        ca=ca,
        cert=cert,
        key=key,
        keep_alive=keep_alive,
        session_expiry=session_expiry,
        clean_start=clean_start,
        will=will,
        receive_maximum=receive_maximum,
        prompt=prompt,
        patience=patience,
        on_state=on_state,
    )
    if url.startswith(LOCAL):
        if url.startswith(f"{LOCAL}//"):
            raise ConfigError(f"write {LOCAL}name, without slashes")
        return LocalBus(url.removeprefix(LOCAL), options)
    address = parse(url)
    if address.scheme in {"mqtt3", "mqtt3s", "ws", "wss"}:
        from broker.legacy import Legacy  # paho takes 100 ms to import

        return Legacy(address, options)
    return Negotiated(address, options)


class Negotiated(Bus):
    """MQTT 5, or 3.1.1 where the broker says or shows that it knows nothing newer. Decided at :meth:`open`."""

    def __init__(self, address: Address, options: Options) -> None:
        self.address = address
        self.options = options
        self._bus: Client | None = None
        self._closed = False

    @property
    def bus(self) -> Client:
        """The client that was chosen.

        :raises ClosedError: none yet.
        """
        if self._bus is None:
            raise ClosedError("the bus is closed" if self._closed else "the bus is not open")
        return self._bus

    @property
    def connected(self) -> bool:
        return self._bus is not None and self._bus.connected

    @property
    def max_payload(self) -> int | None:
        return None if self._bus is None else self._bus.max_payload

    async def open(self) -> None:
        if self._closed:
            raise ClosedError("the bus is closed")
        self._bus = Session(self.address, self.options, impatient=True)
        try:
            await self._bus.open()
        except ConnectError as error:
            if error.code != UNSUPPORTED_VERSION and not isinstance(error, SilentError):
                raise
            from broker.legacy import Legacy

            self._bus = Legacy(self.address, self.options)
            try:
                await self._bus.open()
            except ConnectError as older:
                raise (error if isinstance(error, SilentError) else older) from None

    async def close(self) -> None:
        self._closed = True
        if self._bus is not None:
            await self._bus.close()

    async def publish(self, publications: Sequence[Publication]) -> Receipt:
        return await self.bus.publish(publications)

    async def subscribe(
        self,
        filters: Sequence[str],
        *,
        qos: int = 1,
        capacity: int = 1024,
        overflow: Overflow = "block",
        group: str | None = None,
        retained: bool = True,
    ) -> Subscription:
        return await self.bus.subscribe(
            filters, qos=qos, capacity=capacity, overflow=overflow, group=group, retained=retained
        )
