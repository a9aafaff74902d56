"""Calls of the program that are forked from a process which has imported everything."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from harness import ONE_STEP, python, rank_environment

from sculpt_dist.experiments import jobs
from sculpt_dist.experiments.jobs import Job
from sculpt_dist.experiments.warm import WarmParent

pytestmark = pytest.mark.two_ranks
LONG = [*ONE_STEP, "train.steps=5000", "mask.refresh=0", "train.checkpoint_every=0.001"]


@pytest.fixture
def parent(monkeypatch):
    monkeypatch.setattr(sys, "executable", python())  # the imports are done there, too
    parent = WarmParent(rank_environment())
    yield parent
    parent.close()


def begun(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_call_prints_and_ends_as_one_of_its_own_with_its_environment_and_without_input(
    parent, canvas_config, tmp_path
):
    environment = rank_environment()
    assert parent.start(["--version"], environment).communicate() == ("sculpt-dist 0.1.0\n", None)
    call = parent.start(["export", canvas_config, "run.folder=~/nowhere"], environment | {"HOME": str(tmp_path)})
    assert str(tmp_path / "nowhere") in call.communicate()[0] and call.returncode == 2
    call = parent.start(["unlearn", canvas_config, "trian.lr=1"], environment)
    assert call.communicate()[0].startswith("ConfigError: override 'trian.lr=1'") and call.returncode == 2
    call.send_signal(signal.SIGTERM)  # has ended: nothing happens


def test_a_signal_stops_the_call_that_is_meant_and_it_saves(parent, canvas_config, tmp_path):
    runs = [tmp_path / "first", tmp_path / "second"]
    calls = [parent.start(["unlearn", canvas_config, *LONG, f"run.folder={run}"], rank_environment()) for run in runs]
    for run in runs:
        begun(run)
    calls[0].send_signal(signal.SIGUSR1)
    calls[0].communicate()
    assert calls[0].returncode == 75 and list((runs[0] / "checkpoints").iterdir())
    assert not (runs[1] / "REQUEUE").exists()
    calls[1].send_signal(signal.SIGKILL)
    assert calls[1].communicate()[0] and calls[1].returncode == -signal.SIGKILL


def test_no_call_outlives_the_process_that_asked_for_it(parent, canvas_config, tmp_path):
    call = parent.start(["unlearn", canvas_config, *LONG, f"run.folder={tmp_path / 'run'}"], rank_environment())
    begun(tmp_path / "run")
    pid = call._pid
    parent.close()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (tmp_path / "run" / "REQUEUE").exists()  # it had time to save


@pytest.mark.parametrize("noticed", [0.0, pytest.param(0.5, marks=pytest.mark.exhaustive)])
def test_a_forking_process_that_was_killed_leaves_no_call_waiting(parent, canvas_config, tmp_path, noticed):
    call = parent.start(["unlearn", canvas_config, *LONG, f"run.folder={tmp_path / 'run'}"], rank_environment())
    os.kill(parent._server.pid, signal.SIGKILL)
    time.sleep(noticed)  # seconds in which the other end may see it
    assert parent.start(["--version"], rank_environment()) is None
    call.communicate()
    assert call.returncode == -signal.SIGKILL


def test_jobs_go_on_without_the_forking_process(monkeypatch):
    class Gone(WarmParent):
        def start(self, *_):
            self._server.kill()
            return super().start(*_)

    monkeypatch.setattr(sys, "executable", python())
    monkeypatch.setattr(jobs, "WarmParent", Gone)
    ended: list[object] = []
    call = Job("version", ("--version",))
    assert jobs.run_jobs([call], 1, 1, lambda job, failure: ended.append(failure)) == {} and ended == [None]


@pytest.mark.slow
def test_the_process_that_forks_has_one_thread():
    parent = WarmParent({**os.environ, "OMP_NUM_THREADS": "2"})
    try:
        call = parent.start(["--version"], {**os.environ, "OMP_NUM_THREADS": "2"})
        assert call.communicate()[0] == "sculpt-dist 0.1.0\n"
        assert len(list(Path(f"/proc/{parent._server.pid}/task").iterdir())) == 1
    finally:
        parent.close()
