"""Measures how fast the ranks of a job exchange data: all-reduce, all-gather and reduce-scatter of several sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sculpt_dist.bench.measure import timed
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.engine.group import Group

SMALL = 1024  # numbers in the message that measures latency
SECONDS = 2.0  # at most, for each collective and size


def bench_comm(group: Group, megabytes: Sequence[float], repeats: int = 10) -> dict[str, Any]:
    """Seconds and GB/s of each collective and size: the slowest rank's time, best of `repeats`. All ranks must call it.

    GB/s is the bandwidth of one rank's link, as for a ring: a sum of n bytes over k ranks moves 2 n (k - 1) / k bytes
    through each link, a gather or a scatter n (k - 1) / k. `plan --rates` reads `sum_gb_per_second`,
    `gather_gb_per_second` and `scatter_gb_per_second`, which are those of the largest size, and `latency_us`, the time
    of a small sum divided by log2 k. Raises ConfigError on one rank.
    """
    if group.size < 2:
        raise ConfigError(
            "bench comm: this job has one rank; start several, for example with torchrun --nproc-per-node 2 -m "
            "sculpt_dist bench comm"
        )
    if not megabytes or min(megabytes) <= 0:
        raise ConfigError(f"--megabytes {list(megabytes)}: every size must be above 0")
    small = torch.zeros(SMALL, device=group.device)
    latency = _best(group, lambda: group.sum(small), 20 * repeats) / math.log2(group.size)
    sizes = sorted(int(size * 1e6) for size in megabytes)
    rows = [row for size in sizes for row in _collectives(group, size, repeats)]
    return {
        "ranks": group.size,
        "device": str(group.device.type),
        "torch": torch.__version__,
        **{f"{row['collective']}_gb_per_second": row["gb_per_second"] for row in rows[-3:]},
        "latency_us": latency * 1e6,
        "collectives": rows,
    }


def _collectives(group: Group, size: int, repeats: int) -> list[dict[str, Any]]:
    part = -(-size // (4 * group.size))
    whole, own_part = torch.zeros(part * group.size, device=group.device), torch.zeros(part, device=group.device)
    one_pass = (group.size - 1) / group.size * whole.numel() * 4  # bytes through each link of a ring
    kinds: dict[str, tuple[Callable[[], Tensor], float]] = {
        "sum": (lambda: group.sum(whole), 2 * one_pass),
        "gather": (lambda: group.gather(own_part, whole), one_pass),
        "scatter": (lambda: group.scatter_sum(whole, own_part), one_pass),
    }
    rows = []
    for name, (work, moved) in kinds.items():
        seconds = _best(group, work, repeats)
        rows.append(
            {"collective": name, "megabytes": size / 1e6, "seconds": seconds, "gb_per_second": moved / seconds / 1e9}
        )
    return rows


def _best(group: Group, work: Callable[[], Any], repeats: int) -> float:
    first = _slowest(group, timed(group, work))  # also opens the connections
    return min(_slowest(group, timed(group, work)) for _ in range(max(2, min(repeats, int(SECONDS / first)))))


def _slowest(group: Group, seconds: float) -> float:
    return float(group.max(torch.tensor([seconds], dtype=torch.float64, device=group.device)))
