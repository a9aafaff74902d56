"""Fixtures and options of all tests; what they share else lies in `support/`."""

from __future__ import annotations

import pytest
from harness import PROJECT


@pytest.fixture(scope="session")
def canvas_config() -> str:
    return str(PROJECT / "configs" / "canvas" / "dm_cal.yaml")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--refresh-golden", action="store_true", help="write the golden losses anew; say why in the commit"
    )
