"""The masked step in plain torch: the reference for the other kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_dist.engine.optimizer.kernels import Rule
from sculpt_dist.engine.sharding.moments import pack, ranks_among_open, repack, unpacked, zero_where_closed
from sculpt_dist.engine.sharding.shards import Shard
from sculpt_dist.maths.saliency import accumulate


class Plain:
    """Processes one span at a time, so that intermediate values stay in a CPU's cache."""

    repack = staticmethod(repack)

    def collect(self, shard: Shard, gradient: Tensor, statistic: str | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=gradient.device)
        for where in shard.spans:
            g = _collected(shard, gradient, statistic, where)
            total += g @ g
        return total

    def update(self, shard: Shard, gradient: Tensor, statistic: str | None, rule: Rule) -> Tensor:
        sums = torch.zeros(2, dtype=torch.float64, device=gradient.device)
        if not bool(torch.isfinite(rule.scale)):  # unlike the other kernels, this synchronises with a GPU
            return sums
        packed, one_generation = shard.moments.packed, len(rule.first) == 2
        for where, momentum, variance in shard.moments.pieces(shard.opened):
            g, opened, weights = _collected(shard, gradient, statistic, where), shard.opened[where], shard.flat[where]
            sums[0] += g @ g
            g.mul_(rule.scale)
            ranks = ranks_among_open(opened) if packed else None
            m, v = momentum, variance
            if ranks is not None:
                m, v = unpacked(momentum, ranks, opened), unpacked(variance, ranks, opened)
            m.mul_(rule.beta1).add_(g, alpha=1 - rule.beta1)
            v.mul_(rule.beta2).addcmul_(g, g, value=1 - rule.beta2)
            generation = opened.int()
            first, second = (
                table[1] if one_generation else table.index_select(0, generation) for table in (rule.first, rule.second)
            )
            move = (m * first).div_(v.sqrt().mul_(second).add_(rule.epsilon))
            if rule.decay:
                move.add_(zero_where_closed(weights.clone(), opened), alpha=rule.decay)
            weights.sub_(move, alpha=rule.lr)
            sums[1] += move @ move
            if ranks is not None:
                pack(m, ranks, opened, momentum)
                pack(v, ranks, opened, variance)
        return sums


def _collected(shard: Shard, gradient: Tensor, statistic: str | None, where: slice) -> Tensor:
    """Add the gradient to the saliency; returns a copy of it that is 0 where closed."""
    if statistic is not None:
        accumulate(shard.saliency[where], gradient[where], statistic)
    return zero_where_closed(gradient[where].clone(), shard.opened[where])
