"""What all tests share."""

from __future__ import annotations

import shutil

import pytest

SBIN = "/usr/sbin:/usr/local/sbin"


@pytest.fixture(scope="session")
def needs_mosquitto() -> str:
    """The mosquitto program; skips the test where it is not installed."""
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path=SBIN)
    if program is None:
        pytest.skip("mosquitto is not installed")
    return program


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with RabbitMQ come first: so one process has all of them and starts it once, ten seconds that others need not wait
    for at the end. Each of several processes begins with a stretch of this list.
    """
    items.sort(key=lambda item: "rabbitmq" not in item.name)
