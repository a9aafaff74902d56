"""When a rank dies, hangs or meets another job, the others end soon and the run's log ends with the cause."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import PROJECT, free_port, python, rank_environment

from sculpt_dist.engine.stopping.heartbeat import PATIENCE

pytestmark = pytest.mark.two_ranks
WORKER = str(PROJECT / "tests" / "workers" / "rank_faults.py")


def start_ranks(
    *arguments: str,
    port: int | None = None,
    environment: dict[str, str] = {},  # noqa: B006 (never changed)
    ranks: int = 2,
) -> list[subprocess.Popen]:
    """Run `python ARGUMENTS` on `ranks` ranks without a launcher, so that each process can be observed."""
    common = (
        rank_environment()
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()), "WORLD_SIZE": str(ranks)}
        | environment
    )
    return [
        subprocess.Popen(
            [python(), *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def wait_for(path: Path, processes: list[subprocess.Popen]) -> float:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline and any(p.poll() is None for p in processes), [
            p.stdout.read() for p in processes if p.poll() is not None
        ]
        time.sleep(0.02)
    return time.monotonic()


def last_line(folder: Path) -> str:
    return (folder / "log.txt").read_text().splitlines()[-1]


@dataclass(frozen=True)
class Outcome:
    """What came of a rank's fault: seconds until the other rank ended, what it printed, both exit codes, the log."""

    folder: Path
    seconds: float
    printed: str
    code: int
    faulty_code: int

    @property
    def cause(self) -> str:
        return last_line(self.folder)


FAULTS = {  # fault, seconds of engine.timeout, the faulty rank[, seconds after which a late rank is named]
    "raises": ("raises", 60, 1),
    "killed": ("killed", 60, 1),
    "exits": ("exits", 60, 1),
    "rank 0 killed": ("killed", 60, 0),
    "hangs": ("hangs", 4, 1),
    "stopped": ("stopped", 4, 1),
    "hangs under a backend that raises no error": ("hangs", 60, 1, 4),
    "clock jumps": ("jumps", 4, 1),
    "works alone for longer than the time limit": ("works", 4, 0, 4),
    "works beside the others for longer than the time limit": ("works", 4, 1, 4),
}


def observe(folder: Path, fault: str, timeout: int, rank: int, *late_after: int) -> Outcome:
    folder.mkdir()
    processes = start_ranks(WORKER, fault, str(folder), *map(str, (timeout, rank, *late_after)))
    faulty, other = processes[rank], processes[1 - rank]
    try:
        began = wait_for(folder / f"step-{rank}", processes)
        printed, _ = other.communicate(timeout=60)
        seconds = time.monotonic() - began
    finally:
        if fault in ("hangs", "stopped") and not late_after:
            faulty.kill()  # it would hang on
    return Outcome(folder, seconds, printed, other.returncode, faulty.wait(60))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Outcome]:
    """Of all faults, which happen at the same time: the ranks only wait."""
    folder = tmp_path_factory.mktemp("faults")
    python()  # started before its first use by several threads
    with ThreadPoolExecutor(len(FAULTS)) as pool:
        running = {name: pool.submit(observe, folder / name, *fault) for name, fault in FAULTS.items()}
        return {name: future.result() for name, future in running.items()}


@pytest.mark.parametrize(
    ("fault", "code", "cause"),
    [
        ("raises", 1, "failed: rank 1 on .*: KeyError: 'the true cause'"),
        ("killed", -signal.SIGKILL, "failed: rank 1 died or was stopped .*; seen by rank 0: "),
        ("exits", 0, "failed: rank 1 died or was stopped .*; seen by rank 0: "),
        ("rank 0 killed", -signal.SIGKILL, "failed: rank 0 died or was stopped"),  # it hosts the store
    ],
)
def test_a_dead_rank_ends_the_other_within_five_seconds_and_the_log_ends_with_the_cause(outcomes, fault, code, cause):
    found = outcomes[fault]
    assert found.seconds < 5 and (found.code, found.faulty_code) == (1, code), found.printed
    assert re.search(cause, found.cause), found
    assert not (found.folder / "REQUEUE").exists()


@pytest.mark.parametrize(
    ("fault", "cause"), [("hangs", "rank 1 hangs or is slow"), ("stopped", "rank 1 died or was stopped")]
)
def test_a_hung_rank_is_named_at_the_timeout(outcomes, fault, cause):
    found = outcomes[fault]
    assert 3 < found.seconds < 4 + 5 and found.code == 1
    assert cause in found.cause, found


def test_a_hung_rank_is_named_also_where_a_collective_raises_no_error(outcomes):
    found = outcomes["hangs under a backend that raises no error"]  # as NCCL, whose watchdog aborts the process
    assert 3 < found.seconds < 4 + 5 and (found.code, found.faulty_code) == (1, 1), found
    assert "failed: rank 1 hangs or is slow" in found.cause, found


@pytest.mark.parametrize("how", ["alone", "beside the others"])
def test_work_of_one_rank_may_take_longer_than_the_time_limit(outcomes, how):
    found = outcomes[f"works {how} for longer than the time limit"]
    assert found.seconds > 8 and (found.code, found.faulty_code) == (0, 0), found.printed
    assert found.cause.endswith(" done")


def test_a_wall_clock_that_jumps_by_days_ends_nothing(outcomes):
    found = outcomes["clock jumps"]
    assert (found.code, found.faulty_code) == (0, 0) and found.cause.endswith(" done"), found.printed


def test_a_launchers_signal_does_not_hide_the_cause_from_a_rank_outside_of_any_collective(tmp_path):
    first, second = start_ranks(WORKER, "raises", str(tmp_path), "60", "1", "60")
    second.wait(100)
    first.send_signal(signal.SIGTERM)
    printed, _ = first.communicate(timeout=60)
    assert first.returncode == 1 and not (tmp_path / "REQUEUE").exists(), printed
    assert "failed: rank 1 on" in last_line(tmp_path) and "KeyError: 'the true cause'" in last_line(tmp_path)


def test_a_signal_is_noticed_in_a_collective_while_the_other_rank_is_gone(tmp_path):
    first, second = start_ranks(WORKER, "stopped", str(tmp_path))
    try:
        wait_for(tmp_path / "step-1", [first, second])
        time.sleep(0.5)  # rank 0 is in its collective, which would last a minute
        first.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        first.communicate(timeout=60)
        assert time.monotonic() - asked < 5 and first.returncode == 1
        assert "asked to stop, and exited without saving: rank 1 died or was stopped" in last_line(tmp_path)
        assert not (tmp_path / "REQUEUE").exists()
    finally:
        second.kill()


def test_a_signal_during_a_collective_stops_the_run_once_the_other_rank_arrives(tmp_path):
    processes = start_ranks(WORKER, "waits", str(tmp_path))
    wait_for(tmp_path / "step-0", processes)
    time.sleep(1)
    processes[0].send_signal(signal.SIGUSR1)
    for process in processes:
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 75, printed
    assert "stopped at step 3" in last_line(tmp_path) and (tmp_path / "REQUEUE").exists()


def test_a_stop_file_stops_the_run_and_is_kept(tmp_path):
    (tmp_path / "STOP").touch()
    processes = start_ranks(WORKER, "none", str(tmp_path))
    began = wait_for(tmp_path / "step-0", processes)
    for process in processes:
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 75, printed
    assert time.monotonic() - began < PATIENCE  # an orderly stop waits for no silent rank
    assert "stopped at" in last_line(tmp_path) and (tmp_path / "STOP").exists() and (tmp_path / "REQUEUE").exists()


def test_a_second_job_on_the_port_is_refused_and_the_first_continues(tmp_path):
    port = free_port()
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    first = start_ranks(WORKER, "none", str(one), port=port, environment={"SCULPT_JOB": "a"})
    wait_for(one / "step-0", first)
    second = start_ranks(WORKER, "none", str(two), port=port, environment={"SCULPT_JOB": "b"})
    for process in second:
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 2 and "Traceback" not in printed, printed
        assert "LaunchError" in printed and str(port) in printed
    assert "there job a, fault none; here job b, fault none" in printed and "MASTER_PORT of its own" in printed
    (one / "STOP").touch()
    for process in first:
        assert process.wait(60) == 75
    assert "stopped at step" in last_line(one) and not list(two.iterdir())


def test_a_rank_that_never_comes_is_reported_with_the_address(tmp_path):
    (process,) = start_ranks(WORKER, "none", str(tmp_path), "3", environment={"WORLD_SIZE": "2"}, ranks=1)
    printed, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 2 and "the ranks did not meet at 127.0.0.1:" in printed and "Traceback" not in printed
    ), printed


def test_a_lock_left_by_a_killed_build_does_not_hang_the_start(tmp_path):
    lock = tmp_path / ".cache" / "torch_extensions" / f"py3{sys.version_info.minor}_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    processes = start_ranks(WORKER, "ends", str(tmp_path), environment={"HOME": str(tmp_path)})
    for process in processes:
        assert process.wait(60) == 0


def test_a_launchers_signal_after_a_death_does_not_hide_it(tmp_path):
    first, second = start_ranks(WORKER, "killed", str(tmp_path))
    second.wait(100)
    first.send_signal(signal.SIGTERM)  # as srun --kill-on-bad-exit=1 does
    printed, _ = first.communicate(timeout=60)
    assert first.returncode == 1 and not (tmp_path / "REQUEUE").exists(), printed
    assert "failed: rank 1 died or was stopped" in last_line(tmp_path)
