"""A finished run with its report."""

from __future__ import annotations

from pathlib import Path

import pytest
from handmade_run import write_run

from sculpt_dist.report.report import write_report


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report; tests must not change it."""
    folder = write_run(tmp_path_factory.mktemp("finished") / "run")
    assert write_report(folder) == folder / "report" / "report.html"
    return folder
