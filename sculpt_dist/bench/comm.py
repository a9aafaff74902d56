"""How fast the ranks of a job exchange data: sums, gatherings and scatterings of several sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sculpt_dist.bench.measure import timed
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.engine.group import Group

SMALL = 1024  # numbers of the message that latency is taken from
SECONDS = 2.0  # of each size and collective, at most


def bench_comm(group: Group, megabytes: Sequence[float], repeats: int = 10) -> dict[str, Any]:
    """Seconds and GB/s of each collective and size, best of `repeats`; all ranks enter. The slowest rank's time counts.

    GB/s are those of a rank's link, as for a ring: a sum of n bytes over k ranks moves 2 n (k - 1) / k through each, a
    gathering or scattering n (k - 1) / k. `sum_gb_per_second` and the like are those of the largest size, `latency_us`
    a small sum's time over log2 k: what `plan --rates` reads. Raises ConfigError on one rank.
    """
    if group.size < 2:
        raise ConfigError(
            "bench comm: there is one rank alone; start several, for example bash launch/local.sh 2 bench comm"
        )
    if not megabytes or min(megabytes) <= 0:
        raise ConfigError(f"--megabytes {list(megabytes)}: give sizes of more than 0")
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
    whole, mine = torch.zeros(part * group.size, device=group.device), torch.zeros(part, device=group.device)
    turns = (group.size - 1) / group.size * whole.numel() * 4
    kinds: dict[str, tuple[Callable[[], Tensor], float]] = {
        "sum": (lambda: group.sum(whole), 2 * turns),
        "gather": (lambda: group.gather(mine, whole), turns),
        "scatter": (lambda: group.scatter_sum(whole, mine), turns),
    }
    rows = []
    for name, (work, moved) in kinds.items():
        seconds = _best(group, work, repeats)
        rows.append(
            {"collective": name, "megabytes": size / 1e6, "seconds": seconds, "gb_per_second": moved / seconds / 1e9}
        )
    return rows


def _best(group: Group, work: Callable[[], Any], repeats: int) -> float:
    first = _slowest(group, timed(group, work))  # connections are made with it
    return min(_slowest(group, timed(group, work)) for _ in range(max(2, min(repeats, int(SECONDS / first)))))


def _slowest(group: Group, seconds: float) -> float:
    return float(group.max(torch.tensor([seconds], dtype=torch.float64, device=group.device)))
