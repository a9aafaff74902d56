"""Who computes the masked step: plain torch, the reference; a C routine on a CPU that has a compiler; Triton on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.engine.sharding.shards import Shard


@dataclass(frozen=True)
class Rule:
    """What is the same for all weights in one update: AdamW, algorithm 2 of arXiv 1711.05101, with the corrections by generation."""

    lr: float
    beta1: float
    beta2: float
    epsilon: float
    decay: float  # of open weights
    scale: Tensor  # fp32 [], of the gradient; where it is no number nothing moves
    first: Tensor  # fp32 [generations], 1 / (1 - beta1^age)
    second: Tensor  # fp32 [generations], 1 / root of (1 - beta2^age)


class Kernel(Protocol):
    """Gradients are fp32 [n] of a shard and stay as they are; `statistic` None leaves the saliency alone. Nothing waits for a GPU."""

    def collect(self, shard: Shard, gradient: Tensor, statistic: str | None) -> Tensor:
        """Add the gradient to the saliency; the sum of squares of the gradient of open weights, fp64 []."""

    def update(self, shard: Shard, gradient: Tensor, statistic: str | None, rule: Rule) -> Tensor:
        """`collect`, and one update. Two sums of squares, fp64 [2]: what `collect` gives, and of the moves without lr."""

    def repack(self, swapped: Tensor, opened: Tensor, moment: Tensor, room: Tensor) -> None:
        """See `moments.repack`."""


def choose_kernel(name: str, device: torch.device) -> Kernel:
    """`auto`: fused where it can be had. Raises ConfigError when `fused` cannot."""
    from sculpt_dist.engine.optimizer.kernels import plain

    if name == "plain":
        return plain.Plain()
    if device.type == "cuda":
        from sculpt_dist.engine.optimizer.kernels.gpu import found as on_gpu

        kernel, reason = on_gpu()
    else:
        from sculpt_dist.engine.optimizer.kernels.cpu import found as on_cpu

        kernel, reason = on_cpu()
    if kernel is None and name == "fused":
        raise ConfigError(f"engine.kernel=fused: {reason}; use engine.kernel=auto or plain")
    return kernel or plain.Plain()
