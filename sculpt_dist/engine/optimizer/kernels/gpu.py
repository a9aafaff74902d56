"""The masked step on a GPU: one Triton launch per span, one pass over memory; the host never waits.

Triton's interpreter runs the same code on a CPU (TRITON_INTERPRET=1); the tests use it on machines without a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_dist.engine.optimizer.kernels import Rule
from sculpt_dist.engine.sharding.moments import repack
from sculpt_dist.engine.sharding.shards import Shard

STATISTICS = {None: 0, "abs_sum": 1, "sum_abs": 2, "sum_sq": 3}
BLOCK = 1024


def find_kernel() -> tuple[TritonKernel | None, str]:
    """(the kernel, "") or (None, why there is none)."""
    try:
        return TritonKernel(), ""
    except ImportError:
        return None, "triton is not installed"


class TritonKernel:
    """Launches masked_adamw_triton. Each block's sums are added up in order, independent of the GPU's timing."""

    repack = staticmethod(repack)

    def __init__(self) -> None:
        """Raises ImportError when triton is not installed."""
        from sculpt_dist.engine.optimizer.kernels import masked_adamw_triton

        self._code = masked_adamw_triton

    def collect(self, shard: Shard, gradient: Tensor, statistic: str | None) -> Tensor:
        sums = []
        for where in shard.spans:
            n = where.stop - where.start
            blocks = -(-n // BLOCK)
            squares = torch.empty(blocks, device=gradient.device)
            self._code.collect[(blocks,)](
                gradient[where], shard.opened[where], shard.saliency[where], squares, n,
                statistic=STATISTICS[statistic], block=BLOCK,
            )  # fmt: skip
            sums.append(squares.double().sum())
        return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=gradient.device)

    def update(self, shard: Shard, gradient: Tensor, statistic: str | None, rule: Rule) -> Tensor:
        sums = []
        for where, momentum, variance in shard.moments.pieces(shard.opened):
            n, opened = where.stop - where.start, shard.opened[where]
            blocks = -(-n // BLOCK)
            begins = torch.zeros(
                blocks + 1, dtype=torch.int64, device=gradient.device
            )  # open weights before each block
            if shard.moments.packed:
                self._code.count[(blocks,)](opened, begins[1:], n, block=BLOCK)
                begins = begins.cumsum(0)
            both = torch.empty(2, blocks, device=gradient.device)
            self._code.update[(blocks,)](
                gradient[where], opened, shard.saliency[where], momentum, variance, shard.flat[where], begins, *both,
                rule.scale, rule.first, rule.second, n, rule.lr, rule.beta1, rule.beta2, rule.epsilon, rule.decay,
                statistic=STATISTICS[statistic], packed=shard.moments.packed, block=BLOCK,
            )  # fmt: skip
            sums.append(both.double().sum(1))
        return torch.stack(sums).sum(0) if sums else torch.zeros(2, dtype=torch.float64, device=gradient.device)
