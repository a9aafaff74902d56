"""A finished run of one step, which the tests of a run folder copy and change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from harness import ONE_STEP, sculpt


@pytest.fixture(scope="session")
def one_step_run(tmp_path_factory: pytest.TempPathFactory, canvas_config: str) -> Path:
    folder = tmp_path_factory.mktemp("one-step") / "run"
    sculpt("unlearn", canvas_config, *ONE_STEP, f"run.folder={folder}")
    return folder


@pytest.fixture
def run(one_step_run: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(one_step_run, tmp_path / "run")
    return tmp_path / "run"
