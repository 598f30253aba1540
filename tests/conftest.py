"""What all tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from nodes import log

SBIN = "/usr/sbin:/usr/local/sbin"


@pytest.fixture(scope="session")
def needs_mosquitto() -> str:
    """The mosquitto program; skips the test where it is not installed."""
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path=SBIN)
    if program is None:
        pytest.skip("mosquitto is not installed")
    return program


@pytest.fixture(autouse=True)
def _logged_where_it_was() -> Iterator[None]:
    """A command that ran in this process decides where events go: not for the tests after it."""
    before = log._sink
    yield
    log.send_to(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with RabbitMQ come first: so one process has all of them and starts it once, ten seconds that others need not wait
    for at the end. Each of several processes begins with a stretch of this list.
    """
    items.sort(key=lambda item: "rabbitmq" not in item.name)
