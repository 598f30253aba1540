"""Log events of nodes: a name and fields. Where they go is decided once per process.

A worker sends them to its supervisor, which shows them by structlog (people in a terminal, JSON otherwise), so that the
node processes, of which there are many, do not each carry a renderer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
Sink = Callable[[str, str, dict[str, Any]], None]
"""Takes level (``debug``, ``info``, ``warning``, ``error``), event name and fields."""


def _stderr(level: str, event: str, fields: dict[str, Any]) -> None:
    text = " ".join(f"{key}={value}" for key, value in fields.items())
    sys.stderr.write(f"{level}: {event} {text}\n")


_sink: Sink = _stderr


def send_to(sink: Sink) -> None:
    """Where log events go from now on; called once, by the worker's or the command's start."""
    global _sink
    _sink = sink


def debug(event: str, **fields: Any) -> None:
    """What only somebody looking for a fault wants."""
    _sink("debug", event, fields)


def info(event: str, **fields: Any) -> None:
    """What an operator wants to see go by."""
    _sink("info", event, fields)


def warning(event: str, **fields: Any) -> None:
    """What goes on by itself but should be looked at."""
    _sink("warning", event, fields)


def error(event: str, **fields: Any) -> None:
    """What does not go on by itself."""
    _sink("error", event, fields)


def structured(least: str = "info") -> Sink:
    """A sink that renders by structlog on stderr: for people in a terminal, JSON lines otherwise.

    :param least: events below this level are left out.
    structlog is imported at the first event: a run that has nothing to say does not wait for it.
    """
    loggers: list[Any] = []
    bar = LEVELS.index(least)

    def sink(level: str, event: str, fields: dict[str, Any]) -> None:
        if LEVELS.index(level) < bar:
            return
        if not loggers:
            loggers.append(_logger())
        getattr(loggers[0], level)(event, **fields)

    return sink


def _logger() -> Any:
    import structlog

    chain: list[Any] = [structlog.processors.TimeStamper(fmt="iso", utc=True), structlog.processors.add_log_level]
    if sys.stderr.isatty():
        chain.append(structlog.dev.ConsoleRenderer())
    else:
        chain.append(structlog.processors.JSONRenderer())
    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr), processors=chain, wrapper_class=structlog.BoundLogger
    )
