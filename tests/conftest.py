"""Fixtures and options of all tests; what they share else lies in `support/`."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a test that forks must find no threads of it

from pathlib import Path

import pytest
from gpus import has_gpu, in_gpu_process, run_in_gpu_process
from harness import PROJECT, TINIEST, sculpt


@pytest.fixture(scope="session")
def canvas_config() -> str:
    return str(PROJECT / "configs" / "canvas" / "dm_cal.yaml")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, canvas_config: str) -> Path:
    """The smallest finished run; tests change copies of it only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    sculpt("unlearn", canvas_config, *TINIEST, f"run.folder={folder}")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--refresh-golden", action="store_true", help="write the golden losses anew; say why in the commit"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("there is no GPU that torch can use")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test marked `gpu` in a process that sees the GPUs (see support/gpus.py)."""
    if pyfuncitem.get_closest_marker("gpu") is None or in_gpu_process():
        return None
    run_in_gpu_process(pyfuncitem.nodeid)
    return True
