"""The group of ranks, and the few collectives that the rest of the engine uses."""

from __future__ import annotations

import atexit
import datetime
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sculpt_dist.core.errors import SculptError
from sculpt_dist.engine.launch import choose_device, describe_rank_to_torch, die_with_launcher, rendezvous_ranks

Value = TypeVar("Value")
WATCHDOG_DELAY = 60.0  # seconds after engine.timeout


class Group:
    """All ranks of this job. All of them must call every method that communicates."""

    def __init__(self, timeout: float = 600.0, identity: str = "") -> None:
        """Join the ranks that torchrun, srun or the DeepSpeed launcher started; a process without a launcher is alone.

        `timeout` (seconds) limits how long a collective waits for a rank. `identity` describes the job. Raises
        LaunchError when the ranks at the same address belong to another job, before anything is summed with them.
        """
        launched = describe_rank_to_torch()
        self.device = choose_device()
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
        # A killed build leaves a lock on which the next one waits forever (pytorch issue 189245): share no folder.
        extensions = f"{tempfile.gettempdir()}/sculpt-dist-extensions-{os.getuid()}-{os.getpid()}"
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", extensions)
        warnings.filterwarnings("ignore", r"`torch.distributed.*is deprecated", FutureWarning)  # DeepSpeed's own calls
        import deepspeed
        import deepspeed.comm as comm

        # ZeRO never uses this op, and probing for it would start a compiler for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        self.timeout = timeout
        if backend == "nccl":  # its watchdog aborts the process without a word, so `StopRequest` comes before it
            timeout += WATCHDOG_DELAY
            os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(round(timeout)))
        limit = datetime.timedelta(seconds=timeout)
        if launched:
            die_with_launcher()
        if not torch.distributed.is_initialized():
            # A process that is alone opens no port and leaves nothing in the environment.
            store, rank, size = rendezvous_ranks(limit, identity) if launched else (torch.distributed.HashStore(), 0, 1)
            torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
            _process_store["store"] = store
            if launched:
                atexit.register(_destroy_process_group)
        comm.init_distributed(dist_backend=backend, timeout=limit, verbose=False, auto_mpi_discovery=False)
        self._comm = comm
        self._traffic = _count_traffic(comm.comm.cdb)
        self.rank: int = comm.get_rank()
        self.size: int = comm.get_world_size()
        self.store: Any = _process_store.get("store") if self.size > 1 else None  # None when alone
        self.working = False  # whether this rank does what the others wait for, however long it takes
        self.wait_for_work: Callable[[str], None] | None = None  # until a key is in the store; set by the heartbeat
        self._works = 0

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
        """Gather every rank's `mine` [n] into `whole` [ranks n], in rank order."""
        if self.size > 1:
            self._comm.all_gather_into_tensor(whole, mine)
        return whole

    def scatter_sum(self, whole: Tensor, mine: Tensor) -> Tensor:
        """Sum every rank's `whole` [ranks n] and write this rank's part into `mine` [n]; may overwrite `whole`."""
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
        """Run `work` on rank 0 and return its result on every rank. A SculptError from it is raised on all ranks."""
        results: list[Value] = []
        error: SculptError | None = None
        with self._work(1):
            if self.is_first:
                try:
                    results.append(work())
                except SculptError as raised:
                    error = raised
        results, error = self.from_first((results, error))
        if error is not None:
            raise error
        return results[0]

    def together(self, work: Callable[[], Value]) -> Value:
        """Run `work` on every rank and return each rank's own result.

        A SculptError on any rank is raised on all of them; of several, that of the lowest rank.
        """
        results: list[Value] = []
        error: SculptError | None = None
        with self._work(self.size):
            try:
                results.append(work())
            except SculptError as raised:
                error = raised
        for raised_by_rank in self.to_all(error):
            if raised_by_rank is not None:
                raise raised_by_rank
        return results[0]

    @contextmanager
    def _work(self, workers: int) -> Iterator[None]:
        """The first `workers` ranks do the block, and all ranks wait for them outside any collective.

        A collective would give up at its time limit; here the heartbeats of the ranks at work tell that they live.
        """
        self._works += 1
        self.working = self.rank < workers
        try:
            yield
        finally:
            self.working = False
        if self.store is not None:
            key = f"sculpt-dist/work/{self._works}"
            if self.rank < workers and self.store.add(key, 1) == workers:
                self.store.set(f"{key}/done", "")
            if self.wait_for_work is not None:
                self.wait_for_work(f"{key}/done")

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
        """Bytes in all tensor collectives of this rank so far, DeepSpeed's and ours; each whole tensor counts once."""
        return self._traffic.bytes if self.size > 1 else 0

    @property
    def collectives(self) -> int:
        """How many collectives this rank has entered."""
        return self._traffic.collectives

    @property
    def seconds_communicating(self) -> float:
        """Time that this rank's host spent inside tensor collectives, DeepSpeed's and ours.

        It includes waits for slower ranks. It excludes waits for asynchronous collectives (stage 3 prefetches) and, on
        a GPU, the transfer itself: the host only sees the launch.
        """
        return self._traffic.seconds


_process_store: dict[str, Any] = {}  # the store of this process's one process group


def _destroy_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


COLLECTIVES = ("all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")


@dataclass
class Traffic:
    """What the collectives of this process have communicated."""

    bytes: int = 0
    collectives: int = 0
    seconds: float = 0.0


def _count_traffic(backend: Any) -> Traffic:
    """Wrap the collectives of DeepSpeed's backend: count calls, seconds, and bytes of the first, largest tensor."""
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
            result = collective(*arguments, **options)
            traffic.seconds += time.perf_counter() - began
            return result

        return call

    for name in COLLECTIVES:
        setattr(backend, name, counted(getattr(backend, name)))
    backend.sculpt_traffic = traffic
    return traffic
