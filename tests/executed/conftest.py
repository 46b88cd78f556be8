"""The tests here run with `--executed` only, as `make test-executed` gives it."""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config):
    return None if config.getoption("--executed") else True


@pytest.fixture
def card():
    from executed.driver import card

    return card()
