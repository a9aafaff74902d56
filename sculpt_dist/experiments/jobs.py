"""Runs commands of this program as child processes, several at a time, and stops them cleanly on a signal."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sculpt_dist.core import errors
from sculpt_dist.core.errors import ConfigError, StopRequested
from sculpt_dist.core.signals import STOPPING, is_ignored
from sculpt_dist.experiments.warm import WarmParent, WarmProcess

DONE, STOPPED = 0, 75
Process = subprocess.Popen[str] | WarmProcess
LAUNCHER_VARIABLES = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID "
    "SLURM_STEP_NUM_TASKS SLURM_PROCID SLURM_NTASKS SLURM_NPROCS SLURM_LOCALID SLURM_NTASKS_PER_NODE"
).split()
MARKS = ("STOP", "REQUEUE")  # files in a run folder: a request to stop; stopped before the end, start again
TYPED = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.SculptError)}
SHUTDOWN = "300"  # seconds that torchrun gives its ranks to save a checkpoint


def settings_of_many(folder: Path) -> tuple[str, str]:
    """What the runs of an experiment have in common, unless its own overrides say otherwise.

    They keep few images, and share samples and scores of the base model in a folder of the experiment.
    """
    return "evaluate.keep_images=some", f"prepare.folder={folder.absolute() / 'shared'}"


@dataclass(frozen=True)
class Job:
    """One call of `sculpt-dist`."""

    label: str
    arguments: tuple[str, ...]
    folder: Path | None = None  # its run folder


@dataclass(frozen=True)
class Failure:
    """How a job failed."""

    line: str  # the line with the error, or else the last printed line
    error: str | None = None  # name of the error class; StopRequested after a saved stop, None after a crash

    def __str__(self) -> str:
        return self.line


@dataclass(frozen=True)
class Share:
    """What each of the jobs that run at a time gets of the machine."""

    threads: int
    """OMP_NUM_THREADS of each rank."""
    gpus: tuple[tuple[str, ...], ...]
    """Of each job, as CUDA_VISIBLE_DEVICES names them; empty without GPUs."""

    def __str__(self) -> str:
        if self.gpus:
            return "with GPU " + " | ".join(",".join(own) for own in self.gpus)
        return f"with {self.threads} thread{'s' if self.threads > 1 else ''} for each rank"

    def environment(self, place: int) -> dict[str, str]:
        """The variables of the job at this place among those that run at a time."""
        devices = ",".join(self.gpus[place]) if self.gpus else ""
        return {"OMP_NUM_THREADS": str(self.threads), "CUDA_VISIBLE_DEVICES": devices}


def share_machine(parallel: int, ranks: int, gpus: Sequence[str], gpus_per_job: int | None) -> Share:
    """Divide cores and `gpus` among `parallel` jobs of `ranks` ranks: in turn, each job one GPU per rank by default.

    Raises ConfigError where a job asks for more GPUs than there are.
    """
    wanted = ranks if gpus_per_job is None else gpus_per_job
    if gpus_per_job is not None and wanted > len(gpus):
        raise ConfigError(f"--gpus-per-job {wanted}: this machine shows {len(gpus)} GPUs ({', '.join(gpus) or 'none'})")
    wanted = min(wanted, len(gpus))
    turns = itertools.cycle(gpus)
    own = tuple(tuple(itertools.islice(turns, wanted)) for _ in range(parallel)) if wanted else ()
    cores = max(1, len(os.sched_getaffinity(0)) // (parallel * ranks))
    return Share(int(os.environ.get("OMP_NUM_THREADS", cores)), own)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def run_jobs(
    jobs: Iterable[Job],
    parallel: int,
    ranks: int,
    on_end: Callable[[Job, Failure | None], None],
    gpus_per_job: int | None = None,
) -> dict[str, Failure]:
    """Run all jobs, `parallel` at a time with `ranks` processes each. Returns the failures by the job's label.

    A job is taken from `jobs` only when it can start. STOP and REQUEUE files of an earlier stop are removed from its
    run folder first. `on_end` is called when a job ends, never for two jobs at once. Cores are divided evenly, unless
    OMP_NUM_THREADS is set, and GPUs in turn (see `share_machine`); the first job prints how. Jobs of one rank without a
    GPU are forked from a process that has imported everything.

    On SIGINT, SIGTERM, SIGUSR1 or SIGHUP the running jobs receive SIGTERM, save and stop, and StopRequested is raised.
    It is also raised, after all other jobs have ended, if a job was stopped from outside.
    """
    if parallel < 1 or ranks < 1:
        raise ConfigError(f"jobs={parallel}, ranks={ranks}: each must be at least 1")
    share = share_machine(parallel, ranks, visible_gpus(), gpus_per_job)
    waiting, lock = iter(jobs), threading.Lock()
    started: list[Job] = []
    running: set[Process] = set()
    stopping: list[int] = []
    failed: dict[str, Failure] = {}
    parent: WarmParent | None = None

    def stop(number: int, frame: Any) -> None:
        stopping.append(number)
        for process in list(running):
            process.send_signal(signal.SIGTERM)

    def work(place: int) -> None:
        nonlocal parent
        while True:
            with lock:
                job = None if stopping else next(waiting, None)
                if job is not None and not started:
                    started.append(job)
                    print(f"{parallel} at a time, {share}", flush=True)
                    if ranks == 1 and not share.gpus:
                        parent = WarmParent(_environment() | share.environment(0))
            if job is None:
                return
            failure = _run(job, ranks, share.environment(place), parent, running, stopping)
            with lock:
                if failure is not None:
                    failed[job.label] = failure
                on_end(job, failure)

    before = {number: signal.signal(number, stop) for number in STOPPING if not is_ignored(number)}
    try:
        with ThreadPoolExecutor(parallel) as pool:
            for future in [pool.submit(work, place) for place in range(parallel)]:
                future.result()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if parent is not None:
            parent.close()
    if stopping or any(failure.error == StopRequested.__name__ for failure in failed.values()):
        raise StopRequested("stopped; what was running is saved, and the same command continues from there")
    return failed


def _run(
    job: Job,
    ranks: int,
    share: Mapping[str, str],
    parent: WarmParent | None,
    running: set[Process],
    stopping: list[int],
) -> Failure | None:
    if job.folder is not None:
        for mark in MARKS:
            (job.folder / mark).unlink(missing_ok=True)
    environment = _environment() | dict(share)
    warm = parent.start(job.arguments, environment) if parent else None
    process: Process = warm or _start(job.arguments, ranks, environment)
    running.add(process)
    if stopping:
        process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate()
    running.discard(process)
    if process.returncode == DONE:
        return None
    is_requeued = job.folder is not None and (job.folder / "REQUEUE").exists()  # torchrun does not pass on code 75
    if process.returncode == STOPPED or is_requeued:
        return Failure("stopped and saved", StopRequested.__name__)
    return _failure(printed.splitlines(), process.returncode)


def _start(arguments: Sequence[str], ranks: int, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*_guard(), *_launcher(ranks), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C then reaches this process only, which stops the jobs
    )


def _failure(printed: list[str], code: int) -> Failure:
    """The last line that starts with one of our errors (torchrun may print more lines after it), else the last line."""
    lines = [line for line in printed if line.strip()]
    typed = [line for line in lines if line.partition(": ")[0] in TYPED]
    if typed:
        return Failure(typed[-1], typed[-1].partition(": ")[0])
    if code < 0:
        return Failure(f"ended by {signal.Signals(-code).name}")
    return Failure((lines or [f"exit code {code}"])[-1])


@functools.cache
def _guard() -> tuple[str, ...]:
    """A command prefix that sends a job SIGTERM when this process dies, so that no orphan keeps its run folder locked.

    Linux only. Empty if setpriv is missing or older than util-linux 2.33, which introduced the option.
    """
    guard = ("setpriv", "--pdeathsig", "TERM", "--")
    works = shutil.which(guard[0]) and subprocess.run([*guard, "true"], capture_output=True).returncode == 0
    return guard if works else ()


def _launcher(ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-m", "sculpt_dist"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, "-m", *torchrun, "-m", "sculpt_dist"]


def _environment() -> dict[str, str]:
    """This process's environment without the variables of a launcher."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SHUTDOWN} | kept
