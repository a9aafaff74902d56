"""Commands of this program as processes of their own, some at a time, each ended as it would be by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Callable, Sequence

from sculpt_dist.errors import ConfigError, StopRequested

DONE = 0
LAUNCHERS = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID".split()


@dataclass(frozen=True)
class Job:
    """One call of `sculpt-dist`."""

    label: str
    arguments: tuple[str, ...]


def run_jobs(jobs: Sequence[Job], parallel: int, ranks: int, tell: Callable[[Job, str | None], None]) -> dict[str, str]:
    """Run all jobs, `parallel` at a time with `ranks` processes each; returns the last line that each failed one printed, by its label.

    `tell` is called as each job ends, with None or that line. The cores are shared out evenly unless OMP_NUM_THREADS says otherwise.
    On SIGINT or SIGTERM the running jobs are asked to stop, which they do after saving, and StopRequested is raised.
    """
    if parallel < 1 or ranks < 1:
        raise ConfigError(f"jobs={parallel}, ranks={ranks}: each must be at least 1")
    running: set[subprocess.Popen[str]] = set()
    stopping: list[int] = []

    def stop(number: int, frame: Any) -> None:
        stopping.append(number)
        for process in list(running):
            process.send_signal(signal.SIGTERM)

    def run(job: Job) -> str | None:
        if stopping:
            return "not started"
        process = subprocess.Popen(
            [*_launcher(ranks), *job.arguments],
            env=_environment(parallel * ranks),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then asks them to stop
        )
        running.add(process)
        if stopping:
            process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate()
        running.discard(process)
        lines = [line for line in printed.splitlines() if line.strip()]
        return None if process.returncode == DONE else (lines or [f"exit code {process.returncode}"])[-1]

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    failed: dict[str, str] = {}
    try:
        with ThreadPoolExecutor(parallel) as pool:
            futures = {pool.submit(run, job): job for job in jobs}
            for future in as_completed(futures):
                job, line = futures[future], future.result()
                if line is not None:
                    failed[job.label] = line
                if not stopping:
                    tell(job, line)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopping:
        raise StopRequested("stopped; what was running is saved, and the same command goes on from there")
    return failed


def _launcher(ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-m", "sculpt_dist"]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "sculpt_dist"]


def _environment(processes: int) -> dict[str, str]:
    """This process's environment, without what a launcher said of it."""
    cores = len(os.sched_getaffinity(0))
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    return {"OMP_NUM_THREADS": str(max(1, cores // processes))} | kept
