"""The maps that a topology is made of: brokers, hosts, a node's own keys, an edge's options; as pydantic models.

Every field is described with its unit; ``penstock schema`` is made from these.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, field_validator, model_validator

from schemas import keeping, topics
from schemas.errors import ConfigError, Problem
from schemas.problems import shown
from schemas.units import Rate, Size

MAX_NAME = 64
"""Longest name of a topology, host, broker or node, in characters."""
SCHEMES = ("mqtt", "mqtts", "ws", "wss", "unix")

Delivery: TypeAlias = Literal["safe", "fast"]
Overflow: TypeAlias = Literal["block", "latest", "sample"]


def check_name(text: str) -> str:
    """``text`` if it can be a level of a topic.

    :raises ValueError: it cannot.
    """
    if not topics.is_level(text):
        hint = topics.level(text)
        raise ValueError(f"{shown(text)} is no name: only a-z, 0-9, '_' and '-'; for example {hint!r}")
    if len(text) > MAX_NAME:
        raise ValueError(f"a name of {len(text)} characters, at most {MAX_NAME}")
    return text


class Part(BaseModel):
    """Base of the maps that a topology is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Secret(Part):
    """Where a secret is to be found when it is needed; never the secret itself."""

    env: str | None = Field(default=None, description="name of an environment variable", min_length=1)
    file: str | None = Field(default=None, description="path of a file; its first line is the secret", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _not_plain(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("a secret is never written here; say {env: NAME} or {file: path}")
        return value

    @model_validator(mode="after")
    def _one(self) -> Secret:
        if (self.env is None) == (self.file is None):
            raise ValueError("expected one of 'env' and 'file'")
        return self

    def read(self, base: Path) -> str:
        """The secret. ``base`` is the folder that a relative path starts from.

        :raises ConfigError: the variable is not set, or the file cannot be read.
        """
        if self.env is not None:
            value = os.environ.get(self.env)
            if value is None:
                raise ConfigError(Problem(("env",), f"the environment variable {self.env} is not set"))
            return value
        path = base / Path(self.file or "").expanduser()
        try:
            return path.read_text(encoding="utf-8").split("\n", 1)[0].rstrip("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(Problem(("file",), f"cannot read {path}: {why(error)}")) from None


class Broker(Part):
    """An MQTT broker: one that is there already (``url``), or one that the run starts (``run``)."""

    url: str | None = Field(default=None, description="mqtt://, mqtts://, ws://, wss:// or unix:// and where it is")
    run: Literal["embedded", "mosquitto"] | None = Field(
        default=None, description="the broker that the run starts itself"
    )
    on: str | None = Field(default=None, description="host that starts it; by default the only host that uses it")
    listen: str = Field(
        default="127.0.0.1:0", description="address and port that a started broker listens on; port 0: any free"
    )
    user: str | None = Field(default=None, description="user name", min_length=1)
    password: Secret | None = Field(default=None, description="where the password is to be found")
    ca: str | None = Field(
        default=None, description="path of the PEM file with the authorities to trust; default: the system's"
    )
    cert: str | None = Field(default=None, description="path of our certificate, PEM, for mutual TLS")
    key: str | None = Field(default=None, description="path of our certificate's private key, PEM")

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{shown(url)} is no URL: {error}") from None
        if parts.username is not None or parts.password is not None:
            raise ValueError("no user or password in a URL; say user: and password: {env: NAME}")
        if parts.scheme not in SCHEMES:
            raise ValueError(f"{shown(url)} does not begin with {', '.join(s + '://' for s in SCHEMES)}")
        if not (parts.path if parts.scheme == "unix" else parts.hostname) or port == 0:
            raise ValueError(f"{shown(url)} does not say where the broker is")
        return url

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, listen: str) -> str:
        host, _, port = listen.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"expected an address and a port, e.g. 127.0.0.1:1883, got {shown(listen)}")
        return listen

    @model_validator(mode="after")
    def _together(self) -> Broker:
        if (self.url is None) == (self.run is None):
            raise ValueError("expected one of 'url' (a broker that is there) and 'run' (embedded or mosquitto)")
        given = self.model_fields_set
        if self.run is None and (stray := sorted({"on", "listen"} & given)):
            raise ValueError(f"{stray[0]!r} is for a broker that the run starts, not for one with a 'url'")
        if self.run is not None and (stray := sorted({"user", "password", "ca", "cert", "key"} & given)):
            raise ValueError(f"{stray[0]!r} is for a broker with a 'url', not for one that the run starts")
        if (self.cert is None) != (self.key is None):
            raise ValueError("'cert' and 'key' are given together")
        if self.password is not None and self.user is None:
            raise ValueError("a 'password' needs a 'user'")
        if {"ca", "cert"} & given and not (self.url or "").startswith(("mqtts:", "wss:")):
            raise ValueError("'ca', 'cert' and 'key' need a URL that begins with mqtts:// or wss://")
        return self


class RelayOptions(Part):
    """A relay that keeps on disk what the other broker does not take now."""

    spool: Size = Field(description="bytes on this host's disk for what waits, shared by the ports that are relayed")
    overflow: keeping.Overflow = Field(
        default="block", description="what a full spool does; block: the producers wait, nothing is lost"
    )
    order: keeping.Order = Field(
        default="oldest", description="what goes on first; oldest keeps the order of each source"
    )
    rate: Rate | None = Field(
        default=None, description="most messages per second that leave the spool; default: as many as the link takes"
    )


class Host(Part):
    """A machine, by the name that nodes say in ``on``."""

    broker: str | None = Field(
        default=None, description="name of the broker that its nodes use; by default the only one"
    )
    relay: RelayOptions | None = Field(
        default=None,
        description="keep on this host what safe edges send from its broker to others, while they are away",
    )


class EdgeOptions(Part):
    """How one edge delivers."""

    delivery: Delivery | None = Field(
        default=None,
        description="safe: acknowledged after the effect; fast: once. Default: fast for frames and tensors",
    )
    queue: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] | None = Field(
        default=None, description="messages that may wait at the consumer; default 1024 if safe, 8 if fast"
    )
    overflow: Overflow | None = Field(
        default=None, description="what a full queue of a fast edge does; default block: the producer waits"
    )
    shared: Annotated[bool, Field(strict=True)] = Field(
        default=True, description="false: big tensors go by MQTT to a process of the same host too"
    )

    @model_validator(mode="after")
    def _fits(self) -> EdgeOptions:
        if self.delivery == "safe" and self.overflow not in {None, "block"}:
            raise ValueError(f"a safe edge loses nothing, so it cannot have overflow {self.overflow!r}")
        return self


Sources: TypeAlias = str | list[str] | dict[str, EdgeOptions | None]
"""``from`` as it is written; :mod:`schemas.topology` reads it, so that its faults have their places."""


class NodeSettings(Part):
    """The keys of a node beside its kind."""

    source: Annotated[Sources | None, SkipValidation] = Field(
        default=None,
        alias="from",
        description="what it reads: 'node' or 'node.port', a list of those, or a map from those to edge options",
    )
    on: Annotated[str | list[str] | None, SkipValidation] = Field(
        default=None, description="name of the host that it runs on; by default the only one. A list: a replica on each"
    )
    process: str | None = Field(
        default=None, description="nodes of one host with the same label share one process; by default each has its own"
    )
    publish: Literal["auto", "always"] = Field(
        default="auto", description="always: also on the bus when all consumers are in the same process"
    )
    durable: bool = Field(
        default=False,
        description="what it sends is on its disk until it is done, so that a power cut loses nothing that it took",
    )
    replicas: Annotated[int, Field(ge=1, le=64, strict=True)] | None = Field(
        default=None, description="instances that share its work by source; default 1, or one on each host of 'on'"
    )

    @field_validator("process")
    @classmethod
    def _check_process(cls, label: str | None) -> str | None:
        return None if label is None else check_name(label)


class Document(Part):
    """A topology: small nodes, wired over MQTT."""

    topology: str = Field(description="name of the topology: the first level of its topics")
    brokers: dict[str, Broker] = Field(
        default={}, description="brokers by name; left out: an embedded one, started by the run"
    )
    hosts: dict[str, Host] = Field(default={}, description="hosts by name; left out: one, named local")
    shared: bool = Field(
        default=True, description="false: no edge shares memory; by default big tensors do between processes of a host"
    )
    nodes: dict[str, NodeSettings] = Field(
        description="nodes by name: each has its kind as a key and the kind's config"
    )


def why(error: OSError | UnicodeDecodeError) -> str:
    """Why a file cannot be read, without its name."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else "not UTF-8"
