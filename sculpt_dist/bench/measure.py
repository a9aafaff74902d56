"""Measures time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from sculpt_dist.engine.group import Group
from sculpt_dist.engine.zero import return_free_memory


def timed(group: Group, work: Callable[[], Any]) -> float:
    """Seconds that `work` takes on this rank, started on all ranks at once. All ranks must call it."""
    group.barrier()
    if group.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if group.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@contextmanager
def growth() -> Iterator[list[int]]:
    """The peak growth of memory inside the context, in bytes, as the only item of the list.

    Measures GPU memory if there is a GPU, else this process's anonymous memory (Linux only).
    """
    grown = [0]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield grown
        grown[0] = torch.cuda.max_memory_allocated() - before
        return
    return_free_memory()  # or new allocations could reuse it unseen
    before, done = own_memory(), Event()

    def watch() -> None:
        while not done.wait(0.01):
            grown[0] = max(grown[0], own_memory() - before)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield grown
    finally:
        done.set()
        thread.join()


def own_memory() -> int:
    """Anonymous memory of this process in bytes, from /proc; 0 without /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
