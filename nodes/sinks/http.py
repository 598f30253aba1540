"""Messages to a web service by POST or PUT, in batches; what it cannot take is found by halving.

Each request has an ``Idempotency-Key`` made from the ids of its messages: a repeat after a lost answer has the same.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from nodes.operator import Context, Flow, Sink
from nodes.options import Options
from nodes.sinks import _json
from schemas import codec
from schemas.errors import ConfigError, MissingError, Problem, RejectedError, SinkAwayError
from schemas.messages import Message
from schemas.units import Duration, Size

if TYPE_CHECKING:
    import httpx

EXTRA = "http"
_TYPES = {"json": "application/json", "ndjson": "application/x-ndjson", "msgpack": "application/msgpack"}
_DATA_FAULTS = frozenset({400, 409, 413, 415, 422, 431})
"""Answers that speak of the data. All other refusals (a wrong token, a wrong address) speak of us or of the service, and
no message is given up for them."""


class Secret(BaseModel):
    """A value that is not in the topology but in the environment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    env: str = Field(min_length=1, description="name of the environment variable")
    prefix: str = Field("", description="put before its value, e.g. 'Bearer '")


class Config(Options):
    """Options of the ``http`` sink."""

    url: str = Field(description="address, http:// or https://")
    method: Literal["POST", "PUT"] = Field("POST", description="method of the requests")
    format: Literal["json", "ndjson", "msgpack"] = Field(
        "json", description="json: an array; ndjson: a JSON object a line; msgpack: an array of the wire's messages"
    )
    each: _json.Each = Field("message", description="what one JSON object is: a message, or a row of it")
    headers: dict[str, str | Secret] = Field({}, description="headers; {env: NAME} takes one from the environment")
    timeout: Duration = Field(10 * 10**9, gt=0, description="wait for an answer at most")
    batch: int = Field(500, ge=1, le=10_000, description="most messages a request")
    linger: Duration = Field(50 * 10**6, description="wait to fill a request at most")
    max_bytes: Size = Field(1_000_000, gt=0, description="most bytes a request, before compression")
    gzip: bool = Field(False, description="compress the requests")
    ca: str | None = Field(None, description="file of the authorities that the service's certificate is checked with")

    def check(self, context: Context) -> None:
        try:
            parts = urlsplit(self.url)
            sound = (
                parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
            )
        except ValueError:
            sound = False
        if not sound:
            raise ConfigError(Problem(("url",), f"expected http://host/path or https://host/path, got {self.url!r}"))
        if self.ca is not None and not context.path(self.ca).is_file():
            raise ConfigError(Problem(("ca",), f"no such file: {context.path(self.ca)}"))
        if self.format == "msgpack" and self.each == "row":
            raise ConfigError(Problem(("each",), "msgpack sends whole messages"))
        for name in self.headers:
            if not name or not all(c.isalnum() or c in "!#$%&'*+-.^_`|~" for c in name) or not name.isascii():
                raise ConfigError(Problem(("headers", name), f"{name!r} is no name of a header", on_key=True))

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        del inputs, context
        return {}


def build(config: Config, context: Context) -> Sink:
    """An :class:`HttpSink`.

    :raises MissingError: httpx is not installed.
    :raises ConfigError: an environment variable of a header is not set.
    """
    try:
        import httpx  # noqa: F401 - found out now, not at the first message
    except ImportError:
        raise MissingError("httpx", extra=EXTRA) from None
    headers = {}
    for name, value in config.headers.items():
        if isinstance(value, Secret):
            if (found := os.environ.get(value.env)) is None:
                raise ConfigError(Problem(("headers", name, "env"), f"the environment variable {value.env} is not set"))
            headers[name] = value.prefix + found
        else:
            headers[name] = value
    return HttpSink(config, context, headers)


class HttpSink(Sink):
    """One connection that is kept open; one request at a time, so that order is kept."""

    def __init__(self, config: Config, context: Context, headers: dict[str, str]) -> None:
        self.max_batch = config.batch
        self.linger = config.linger / 1e9
        self._config = config
        self._ca = None if config.ca is None else str(context.path(config.ca))
        self._headers = {**headers, "Content-Type": _TYPES[config.format]}
        if config.gzip:
            self._headers["Content-Encoding"] = "gzip"
        self._client: httpx.AsyncClient | None = None
        self._done: set[str] = set()

    async def open(self) -> None:
        import ssl

        import httpx

        if self._client is None:
            secure = self._config.url.startswith("https:")
            verify = ssl.create_default_context(cafile=self._ca) if secure else False
            limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
            timeout = self._config.timeout / 1e9
            self._client = httpx.AsyncClient(verify=verify, limits=limits, timeout=timeout, trust_env=True)

    async def write(self, messages: Sequence[Message]) -> None:
        rejected: list[tuple[int, str]] = []
        parts: list[tuple[int, bytes]] = []
        for i, message in enumerate(messages):
            if message.id in self._done:  # taken when this batch was tried before
                continue
            try:
                part = self._encode(message)
            except (TypeError, ValueError, OverflowError) as error:
                rejected.append((i, f"cannot be written as {self._config.format}: {error}"))
                continue
            if len(part) + 2 > self._config.max_bytes:
                rejected.append((i, f"{len(part)} bytes, at most {self._config.max_bytes} (max_bytes)"))
            elif part:
                parts.append((i, part))
        for request in self._requests(parts):
            await self._send(request, messages, rejected)
        self._done.clear()
        if rejected:
            raise RejectedError(sorted(rejected))

    def _encode(self, message: Message) -> bytes:
        if self._config.format == "msgpack":
            return codec.encode(message)
        between = b"\n" if self._config.format == "ndjson" else b","
        return between.join(line for _, line in _json.lines([message], self._config.each))

    def _requests(self, parts: list[tuple[int, bytes]]) -> list[list[tuple[int, bytes]]]:
        """Runs of at most ``max_bytes``, and of ``batch`` messages."""
        out: list[list[tuple[int, bytes]]] = []
        room = 0
        for part in parts:
            need = len(part[1]) + 1
            if not out or need > room or len(out[-1]) >= self._config.batch:
                out.append([])
                room = self._config.max_bytes - 8
            out[-1].append(part)
            room -= need
        return out

    async def _send(
        self, request: list[tuple[int, bytes]], messages: Sequence[Message], rejected: list[tuple[int, str]]
    ) -> None:
        """Send one request; if its data are refused, halve it until only what is refused is left out.

        :raises SinkAwayError: the service is away, busy, or refuses us.
        """
        ids = [messages[i].id for i, _ in request]
        refused = await self._post([part for _, part in request], ids)
        if refused is None:
            self._done.update(ids)
        elif len(request) == 1:
            rejected.append((request[0][0], refused))
        else:
            half = len(request) // 2
            await self._send(request[:half], messages, rejected)
            await self._send(request[half:], messages, rejected)

    async def _post(self, parts: list[bytes], ids: list[str]) -> str | None:
        """One request. Answers why the data were refused, or None if they were taken."""
        import httpx

        if self._client is None:
            await self.open()
        assert self._client is not None  # noqa: S101 - open() sets it
        content = self._join(parts)
        if self._config.gzip:
            content = gzip.compress(content, 6, mtime=0)
        key = hashlib.sha256("\n".join(ids).encode("utf-8", "replace")).hexdigest()[:32]
        headers = {**self._headers, "Idempotency-Key": key}
        where = self._config.url
        try:
            answer = await self._client.request(self._config.method, where, content=content, headers=headers)
        except httpx.TimeoutException:
            raise SinkAwayError(f"{where}: no answer within {self._config.timeout / 1e9:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, ssl_error()) as error:
            raise SinkAwayError(f"{where}: {str(error) or type(error).__name__}") from error
        if answer.is_success:
            return None
        text = f"{where}: {answer.status_code} {answer.reason_phrase}"
        if answer.status_code in _DATA_FAULTS:
            return f"{text}: {answer.text[:200]}".strip()
        raise SinkAwayError(text, retry_after=retry_after(answer.headers.get("Retry-After")))

    def _join(self, parts: list[bytes]) -> bytes:
        match self._config.format:
            case "json":
                return b"[" + b",".join(parts) + b"]"
            case "ndjson":
                return b"\n".join(parts) + b"\n"
            case "msgpack":
                return msgspec.msgpack.encode([msgspec.Raw(part) for part in parts])

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None


def ssl_error() -> type[Exception]:
    """The error of a failed TLS handshake that no client wraps; imported late, ``ssl`` is heavy."""
    import ssl

    return ssl.SSLError


def retry_after(value: str | None) -> float | None:
    """Seconds to wait by a ``Retry-After`` header: seconds or an HTTP date; at most an hour. None: it says nothing."""
    if value is None:
        return None
    seconds: float | None = None
    with suppress(ValueError, TypeError, OverflowError):
        if value.strip().isdecimal():
            seconds = float(value)
        else:
            moment: Any = parsedate_to_datetime(value)
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            seconds = (moment - datetime.now(UTC)).total_seconds()
    return None if seconds is None else min(max(seconds, 0.0), 3600.0)
