"""How a rank is started: its place and address from the launcher, its device, and the meeting of all ranks."""

from __future__ import annotations

import ctypes
import datetime
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from sculpt_dist.core.errors import ConfigError, LaunchError, StopRequested
from sculpt_dist.core.signals import early

Value = TypeVar("Value")


def job_name() -> str:
    """The name that the scheduler or launcher gave this job, equal on all of its ranks; empty when it gave none."""
    names = ("SCULPT_JOB", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID")
    return ".".join(os.environ[name] for name in names if os.environ.get(name, "none") != "none")


def rendezvous_ranks(limit: datetime.timedelta, identity: str) -> tuple[Any, int, int]:
    """Meet at MASTER_ADDR:MASTER_PORT; returns (store, rank, ranks).

    Raises LaunchError when the ranks do not come in time, or when another job is there.

    Rank 0 publishes the job's identity and the others compare theirs: without this check, ranks of two jobs that share
    a port would silently sum each other's gradients.
    """
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    here = f"job {job_name() or 'without a name'}, {identity}"
    try:
        store, rank, size, there = _interruptible(lambda: _meet(limit, here))
    except (torch.distributed.DistError, ValueError) as error:
        raise LaunchError(
            f"the ranks did not meet at {address} (MASTER_ADDR:MASTER_PORT): {str(error).splitlines()[0]}"
        ) from error
    if there != here:
        raise LaunchError(
            f"rank {rank} met ranks of another job at {address}: there {there}; here {here}. Give every job a "
            "MASTER_PORT of its own, and all ranks of a job the same configuration"
        )
    return store, rank, size


def _meet(limit: datetime.timedelta, here: str) -> tuple[Any, int, int, str]:
    """(store, rank, ranks, what the first rank says of its job)."""
    store, rank, size = next(torch.distributed.rendezvous("env://", timeout=limit))
    key = "sculpt-dist/job"
    return store, rank, size, (store.compare_set(key, "", here) if rank == 0 else store.get(key)).decode()


def _interruptible(work: Callable[[], Value]) -> Value:
    """Do `work`, which may wait long in C++, in a thread; raises StopRequested at a signal."""
    found: list[Value] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="rendezvous", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        if early:
            raise StopRequested("stopped while it waited for the other ranks of its job")
    if failed:
        raise failed[0]
    return found[0]


def describe_rank_to_torch() -> bool:
    """Whether a launcher started this process. Under srun, also set the variables that torch.distributed reads."""
    env = os.environ
    # Set by srun for its step; the tasks of the whole job also stand in a batch script, where one process runs alone.
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in env and "SLURM_PROCID" in env and int(tasks) > 1:
        env["RANK"] = env["SLURM_PROCID"]
        env["WORLD_SIZE"] = tasks
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        if "MASTER_ADDR" not in env:
            raise ConfigError(
                "srun started several tasks without MASTER_ADDR: export the first node's name in the batch script"
            )
        env.setdefault("MASTER_PORT", str(10000 + int(env["SLURM_JOB_ID"]) % 20000))
    env.setdefault("LOCAL_RANK", "0")
    return "RANK" in env and "WORLD_SIZE" in env


def choose_device() -> torch.device:
    """This rank's device. LOCAL_RANK becomes its number, which DeepSpeed reads.

    A node's ranks may all see its GPUs, or each only its own (`srun --gpus-per-task=1`), which is then number 0.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus, ranks_here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks_here > gpus:
        raise ConfigError(
            f"{ranks_here} ranks on a machine with {gpus} GPU(s): start one rank per GPU, or set "
            "CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % gpus)
    os.environ["LOCAL_RANK"] = str(device.index)
    torch.cuda.set_device(device)
    return device


def die_with_launcher() -> None:
    """Let Linux kill this rank when its launcher dies: an orphan would keep writing into the run folder."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # prctl's PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
