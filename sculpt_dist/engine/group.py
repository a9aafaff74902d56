"""The group of ranks: start-up, and the few collectives that the rest of the engine is written with."""

from __future__ import annotations

import atexit
import ctypes
import datetime
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sculpt_dist.core.errors import ConfigError, LaunchError, SculptError

Value = TypeVar("Value")


class Group:
    """All ranks of this job. Every method that communicates must be entered by all of them."""

    def __init__(self, timeout: float = 600.0, identity: str = "") -> None:
        """Join the ranks that torchrun, srun or the DeepSpeed launcher started; alone when nobody did.

        `timeout` (seconds) bounds how long any collective may wait for a rank. `identity` says what this job is about: ranks of
        another job that met at the same address are refused with LaunchError, before anything is summed with them.
        """
        launched = _describe_rank_to_torch()
        self.device = _choose_device()
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
        # A build that was killed leaves a lock on which the next one waits for ever (pytorch issue 189245); so no shared folder.
        os.environ.setdefault(
            "TORCH_EXTENSIONS_DIR", f"{tempfile.gettempdir()}/sculpt-dist-extensions-{os.getuid()}-{os.getpid()}"
        )
        warnings.filterwarnings("ignore", r"`torch.distributed.*is deprecated", FutureWarning)  # DeepSpeed's own calls
        import deepspeed
        import deepspeed.comm as comm

        # ZeRO never uses this op, and probing it would start a compiler for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        limit = datetime.timedelta(seconds=timeout)
        if launched:
            _die_with_the_launcher()
        if not torch.distributed.is_initialized():  # alone: no port, and nothing left in the environment
            store, rank, size = _meet(limit, identity) if launched else (torch.distributed.HashStore(), 0, 1)
            torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
            _meeting_point["store"] = store
            if launched:
                atexit.register(_leave)
        comm.init_distributed(dist_backend=backend, timeout=limit, verbose=False, auto_mpi_discovery=False)
        self._comm = comm
        self._traffic = _count_traffic(comm.comm.cdb)
        self.rank: int = comm.get_rank()
        self.size: int = comm.get_world_size()
        self.store: Any = _meeting_point.get("store") if self.size > 1 else None  # where the ranks met; None alone

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place; any shape, integers or floats."""
        if self.size > 1:
            self._comm.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """The maximum over ranks, in place."""
        if self.size > 1:
            self._comm.all_reduce(values, op=self._comm.ReduceOp.MAX)
        return values

    def gather(self, mine: Tensor, whole: Tensor) -> Tensor:
        """Every rank's `mine` [n] into `whole` [ranks n], in rank order."""
        if self.size > 1:
            self._comm.all_gather_into_tensor(whole, mine)
        return whole

    def scatter_sum(self, whole: Tensor, mine: Tensor) -> Tensor:
        """This rank's part of the sum of every rank's `whole` [ranks n] into `mine` [n]; `whole` may be lost."""
        if self.size > 1:
            self._comm.reduce_scatter_tensor(mine, whole)
        return mine

    def from_first(self, value: Value) -> Value:
        """Rank 0's value, on every rank."""
        box = [value]
        if self.size > 1:
            self._traffic.collectives += 1
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def on_first(self, work: Callable[[], Value]) -> Value:
        """What `work` gives on rank 0, on every rank; a SculptError that it raises is raised on all of them."""
        outcome: tuple[Value | None, SculptError | None] = (None, None)
        if self.is_first:
            try:
                outcome = (work(), None)
            except SculptError as error:
                outcome = (None, error)
        value, failed = self.from_first(outcome)
        if failed is not None:
            raise failed
        return value

    def together(self, work: Callable[[], Value]) -> Value:
        """What `work` gives on each rank; a SculptError that it raises on any of them is raised on all, that of the lowest rank."""
        value, failed = None, None
        try:
            value = work()
        except SculptError as error:
            failed = error
        first = next((error for error in self.to_all(failed) if error is not None), None)
        if first is not None:
            raise first
        return value

    def to_all(self, value: Value) -> list[Value]:
        """Every rank's value, in rank order, on every rank."""
        box: list[Value] = [value] * self.size
        if self.size > 1:
            self._traffic.collectives += 1
            torch.distributed.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        if self.size > 1:
            self._traffic.collectives += 1
            torch.distributed.barrier()

    def bytes_communicated(self) -> int:
        """Payload of all tensor collectives that this rank entered, DeepSpeed's and ours, in bytes; the whole tensor counts once."""
        return self._traffic.bytes if self.size > 1 else 0

    @property
    def collectives(self) -> int:
        """How many collectives this rank has entered."""
        return self._traffic.collectives

    @property
    def seconds_communicating(self) -> float:
        """Time that this rank's host spent inside tensor collectives, DeepSpeed's and ours: waiting for slower ranks is part of it.

        Not in it: waits on a collective that was only started (stage 3 gathers ahead), and on a GPU the transfer itself, of which the
        host sees the launch alone.
        """
        return self._traffic.seconds


_meeting_point: dict[str, Any] = {}  # the store that the process group was made with; a process has one


def job_name() -> str:
    """What a scheduler or launcher calls this job; the same on all of its ranks, empty where nobody named it."""
    names = ("SCULPT_JOB", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID")
    return ".".join(os.environ[name] for name in names if os.environ.get(name, "none") != "none")


def _meet(limit: datetime.timedelta, identity: str) -> tuple[Any, int, int]:
    """(store, rank, ranks) where MASTER_ADDR and MASTER_PORT say. Raises LaunchError when nobody comes, or another job is there.

    Rank 0 says what the job is, and the others compare: ranks of two jobs that share a port would otherwise add up each other's
    gradients without any error.
    """
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    mine = f"job {job_name() or 'without a name'}, {identity}"
    try:
        store, rank, size = next(torch.distributed.rendezvous("env://", timeout=limit))
        key = "sculpt-dist/job"
        held = (store.compare_set(key, "", mine) if rank == 0 else store.get(key)).decode()
    except (torch.distributed.DistError, ValueError) as error:
        raise LaunchError(
            f"the ranks did not meet at {where} (MASTER_ADDR:MASTER_PORT): {str(error).splitlines()[0]}"
        ) from error
    if held != mine:
        raise LaunchError(
            f"rank {rank} met ranks of another job at {where}: there {held}; here {mine}. Give every job a MASTER_PORT of its own, and all "
            "ranks of a job the same configuration"
        )
    return store, rank, size


def _describe_rank_to_torch() -> bool:
    """Whether a launcher started this process; where srun did, set what torch.distributed reads from the environment."""
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = (
            env["SLURM_PROCID"],
            env["SLURM_NTASKS"],
            env["SLURM_LOCALID"],
        )
        if "MASTER_ADDR" not in env:
            raise ConfigError(
                "srun started several tasks without MASTER_ADDR: export the first node's name in the batch script"
            )
        env.setdefault("MASTER_PORT", str(10000 + int(env["SLURM_JOB_ID"]) % 20000))
    env.setdefault("LOCAL_RANK", "0")
    return "RANK" in env and "WORLD_SIZE" in env


def _choose_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus, ranks_here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks_here > gpus:
        raise ConfigError(
            f"{ranks_here} ranks on a machine with {gpus} GPU(s): start one rank per GPU, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % gpus)
    torch.cuda.set_device(device)
    return device


def _die_with_the_launcher() -> None:
    """Ask Linux to kill this rank when its launcher dies: an orphan would go on writing into the run folder."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # prctl's PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


COLLECTIVES = ("all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")


@dataclass
class Traffic:
    """What went through the collectives of this process."""

    bytes: int = 0
    collectives: int = 0
    seconds: float = 0.0


def _count_traffic(backend: Any) -> Traffic:
    """Count the collectives that DeepSpeed's backend carries out: the bytes of the first (largest) tensor of each, how many, how long."""
    if hasattr(backend, "sculpt_traffic"):  # a second run in this process
        return backend.sculpt_traffic
    traffic = Traffic()

    def counted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            traffic.collectives += 1
            first = (*arguments, *options.values())[0]
            for tensor in first if isinstance(first, (list, tuple)) else [first]:
                traffic.bytes += tensor.numel() * tensor.element_size()
            began = time.perf_counter()
            started = collective(*arguments, **options)
            traffic.seconds += time.perf_counter() - began
            return started

        return call

    for name in COLLECTIVES:
        setattr(backend, name, counted(getattr(backend, name)))
    backend.sculpt_traffic = traffic
    return traffic
