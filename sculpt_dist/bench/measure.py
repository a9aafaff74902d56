"""Time and memory, measured."""

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
    """Seconds of this rank; all ranks enter."""
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
    """Bytes by which this process's own memory grew at most meanwhile: of the GPU where there is one, else as Linux
    tells it.
    """
    grown = [0]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield grown
        grown[0] = torch.cuda.max_memory_allocated() - before
        return
    return_free_memory()  # or what is needed would hide in what is free already
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
    """Bytes of this process that no file backs, as Linux tells it; 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
