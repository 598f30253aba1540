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
