"""The group of ranks: start-up, and the few collectives that the rest of the engine is written with."""

from __future__ import annotations

import datetime
import os
import warnings
from typing import TypeVar

import torch
from torch import Tensor

from sculpt_dist.errors import ConfigError

Value = TypeVar("Value")


class Group:
    """All ranks of this job. Every method that communicates must be entered by all of them."""

    def __init__(self, timeout: float = 600.0) -> None:
        """Join the ranks that torchrun, srun or the DeepSpeed launcher started; alone when nobody did.

        `timeout` (seconds) bounds how long any collective may wait for a rank.
        """
        launched = _describe_rank_to_torch()
        self.device = _choose_device()
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
        warnings.filterwarnings("ignore", r"`torch.distributed.*is deprecated", FutureWarning)  # DeepSpeed's own calls
        import deepspeed
        import deepspeed.comm as comm

        # ZeRO never uses this op, and probing it would start a compiler for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if not launched and not torch.distributed.is_initialized():  # alone: no port, and nothing left in the environment
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        comm.init_distributed(
            dist_backend=backend,
            timeout=datetime.timedelta(seconds=timeout),
            verbose=False,
            auto_mpi_discovery=False,
        )
        self._comm = comm
        comm.configure(enabled=True, prof_all=True, verbose=False)
        self.rank: int = comm.get_rank()
        self.size: int = comm.get_world_size()
        self._sent_before = 0
        self._sent_before = self.bytes_communicated()

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

    def from_first(self, value: Value) -> Value:
        """Rank 0's value, on every rank."""
        box = [value]
        if self.size > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def to_all(self, value: Value) -> list[Value]:
        """Every rank's value, in rank order, on every rank."""
        box: list[Value] = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    def bytes_communicated(self) -> int:
        """Payload of all tensor collectives of this rank so far, DeepSpeed's and ours, in bytes as DeepSpeed counts them."""
        if self.size == 1:
            return 0
        records = self._comm.comm.comms_logger.comms_dict.values()
        return sum(int(size) * entry[0] for sizes in records for size, entry in sizes.items()) - self._sent_before

    def close(self) -> None:
        """Leave the group; a process alone keeps its own, so that the next run in it can start."""
        if self.size > 1:
            self.barrier()  # a rank that leaves early would abort the others' last collective
            torch.distributed.destroy_process_group()


def _describe_rank_to_torch() -> bool:
    """Whether a launcher started this process; where srun did, set what torch.distributed reads from the environment."""
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_NTASKS"], env["SLURM_LOCALID"]
        if "MASTER_ADDR" not in env:
            raise ConfigError("srun started several tasks without MASTER_ADDR: export the first node's name in the batch script")
        env.setdefault("MASTER_PORT", str(10000 + int(env["SLURM_JOB_ID"]) % 20000))
    env.setdefault("LOCAL_RANK", "0")
    return "RANK" in env and "WORLD_SIZE" in env


def _choose_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
