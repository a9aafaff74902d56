"""The arithmetic of the masked step, three times.

`plain` is torch, and the reference; `cpu` compiles and calls masked_adamw.c; `gpu` launches masked_adamw_triton.
`choose_kernel` picks one for a device. The optimizer and the benchmarks import this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.engine.sharding.shards import Shard


@dataclass(frozen=True)
class Rule:
    """The constants of one update: AdamW, algorithm 2 of arXiv 1711.05101, with bias corrections per generation."""

    lr: float
    beta1: float
    beta2: float
    epsilon: float
    decay: float  # of open weights
    scale: Tensor  # fp32 [], multiplies the gradient; when it is NaN, nothing moves
    first: Tensor  # fp32 [generations], 1 / (1 - beta1^age)
    second: Tensor  # fp32 [generations], 1 / sqrt(1 - beta2^age)


class Kernel(Protocol):
    """What every kernel computes.

    `gradient` is fp32 [n] of a shard and is not changed. With `statistic` None the saliency is not changed. Fused
    kernels never synchronise with a GPU.
    """

    def collect(self, shard: Shard, gradient: Tensor, statistic: str | None) -> Tensor:
        """Add the gradient to the saliency; returns the sum of squares of the open weights' gradient, fp64 []."""

    def update(self, shard: Shard, gradient: Tensor, statistic: str | None, rule: Rule) -> Tensor:
        """`collect`, then one update; returns the sums of squares of gradient and moves (without lr), fp64 [2]."""

    def repack(self, swapped: Tensor, opened: Tensor, moment: Tensor, room: Tensor) -> None:
        """See `moments.repack`."""


def choose_kernel(name: str, device: torch.device) -> Kernel:
    """The kernel for `engine.kernel`; `auto` prefers the fused one. Raises ConfigError if `fused` is unavailable."""
    from sculpt_dist.engine.optimizer.kernels import plain

    if name == "plain":
        return plain.Plain()
    kernel: Kernel | None
    if device.type == "cuda":
        from sculpt_dist.engine.optimizer.kernels import gpu

        kernel, reason = gpu.find_kernel()
    else:
        from sculpt_dist.engine.optimizer.kernels import cpu

        kernel, reason = cpu.find_kernel()
    if kernel is None and name == "fused":
        raise ConfigError(f"engine.kernel=fused: {reason}; use engine.kernel=auto or plain")
    return kernel or plain.Plain()
