"""Locks: one holder at a time on any file system; the dead are replaced, the living named."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time

import pytest
from harness import PROJECT, SMALL, Ranks, launch

from sculpt_dist.core import locks
from sculpt_dist.core.locks import Lock

HOLD = """
import sys, time
from pathlib import Path
from sculpt_dist.core import locks
locks.BEAT = 0.1
lock = locks.Lock(Path(sys.argv[1]))
print(lock.acquire(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "PATIENCE", 1.0)
    monkeypatch.setattr(locks, "SETTLE", 0.5)


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def without_flock(request, quick, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


def of_another_machine(file, beat=1):
    content = {"host": "node7", "pid": 4711, "job": "12", "kernel": "another", "token": "theirs", "beat": beat}
    file.write_bytes(json.dumps(content).encode().ljust(locks.SIZE))


def beating(file, until):
    while not until.wait(0.02):
        of_another_machine(file, beat=time.monotonic_ns())


def holding(file):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROJECT
    )
    assert process.stdout.readline() == "None\n"
    return process


def test_the_second_holder_is_told_of_the_first_and_a_killed_one_is_replaced_at_once(tmp_path):
    file = tmp_path / ".lock"
    other = holding(file)
    assert Lock(file).acquire() == f"process {other.pid} on {platform.node()}"
    other.send_signal(signal.SIGKILL)
    other.wait()
    mine, began = Lock(file), time.monotonic()
    assert mine.acquire() is None and time.monotonic() - began < 1
    assert Lock(file).acquire() == f"process {os.getpid()} on {platform.node()}"
    mine.release()
    assert file.read_bytes() == b""
    with Lock(file):
        assert Lock(file).acquire() is not None


def test_without_flock_a_holder_that_beats_is_kept_and_a_silent_one_replaced(tmp_path, without_flock):
    file = tmp_path / ".lock"
    mine = Lock(file)
    assert mine.acquire() is None
    assert Lock(file).acquire() == f"process {os.getpid()} on {platform.node()}"
    mine.release()
    of_another_machine(file)
    assert Lock(file).acquire() is None


def test_a_holder_on_another_machine_counts_where_flock_does_not_reach(tmp_path, quick):
    file, ended = tmp_path / ".lock", threading.Event()
    of_another_machine(file)
    theirs = threading.Thread(target=beating, args=(file, ended))
    theirs.start()
    assert Lock(file).acquire() == "process 4711 on node7, Slurm job 12"
    ended.set()
    theirs.join()
    mine = Lock(file)
    assert mine.acquire() is None
    mine.release()


def test_a_holder_that_was_replaced_while_it_was_stopped_ends(tmp_path):
    file = tmp_path / ".lock"
    replaced = holding(file)
    of_another_machine(file)
    assert replaced.wait(20) == 2
    assert "process 4711 on node7, Slurm job 12 has taken over" in replaced.stderr.read()


@pytest.mark.parametrize("without_flock", [errno.ENOLCK], indirect=True)
def test_of_several_takers_of_a_dead_lock_one_gets_it(tmp_path, without_flock):
    for attempt in range(2):
        file = tmp_path / f"{attempt}.lock"
        of_another_machine(file)
        takers, found = [Lock(file) for _ in range(8)], []
        start = threading.Barrier(len(takers))

        def take(lock, found=found, start=start):
            start.wait()
            found.append(lock.acquire())

        threads = [threading.Thread(target=take, args=(lock,)) for lock in takers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found.count(None) == 1
        for lock in takers:
            lock.release()


def test_a_run_on_a_file_system_without_flock_is_refused_beside_a_living_one_and_follows_a_killed_one(
    canvas_config, tmp_path
):
    run, worker = tmp_path / "run", str(PROJECT / "tests" / "workers" / "no_flock.py")
    call = [worker, "prepare", canvas_config, *SMALL, "model.arch=sana", f"run.folder={run}"]
    first = Ranks(1, *call, "prepare.samples=600", output=tmp_path / "first.txt")
    until = time.monotonic() + 60
    while not list(run.glob("data/*/*/*.tar")) and time.monotonic() < until:
        time.sleep(0.05)
    refused = launch(1, *call, code=2)
    assert f"in use by process {first.pids[0]} on {platform.node()} ({run / '.lock'})" in refused
    first.processes[0].send_signal(signal.SIGKILL)
    assert f"samples are in {run / 'data'}" in launch(1, *call)
