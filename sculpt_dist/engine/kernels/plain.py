"""The masked step as a chain of torch operations: what the other forms are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_dist.engine.kernels import Rule
from sculpt_dist.engine.moments import unpacked
from sculpt_dist.engine.shards import Shard
from sculpt_dist.maths.saliency import accumulate


class Plain:
    """Works span by span, so that intermediate values stay in a CPU's cache."""

    def collect(self, shard: Shard, gradient: Tensor, statistic: str | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=gradient.device)
        for where in shard.spans:
            total += _collected(shard, gradient, statistic, where).double().square().sum()
        return total

    def update(self, shard: Shard, gradient: Tensor, statistic: str | None, rule: Rule) -> Tensor:
        sums = torch.zeros(2, dtype=torch.float64, device=gradient.device)
        moves = torch.isfinite(rule.scale)
        for where, momentum, variance in shard.moments.pieces(shard.opened):
            g, opened, weights = _collected(shard, gradient, statistic, where), shard.opened[where], shard.flat[where]
            sums[0] += g.double().square().sum()
            is_open = opened > 0
            m, v = (unpacked(moment, is_open) if shard.moments.packed else moment for moment in (momentum, variance))
            g = g * rule.scale
            new_m = (m * rule.beta1).add_(g, alpha=1 - rule.beta1)
            new_v = (v * rule.beta2).addcmul_(g, g, value=1 - rule.beta2)
            generation = opened.int()
            below = new_v.sqrt().mul_(rule.second.index_select(0, generation)).add_(rule.epsilon)
            move = (new_m * rule.first.index_select(0, generation)).div_(below)
            if rule.decay:
                move.add_(weights * is_open, alpha=rule.decay)
            weights.copy_(torch.where(moves, weights - rule.lr * move, weights))
            for moment, new, old in ((momentum, new_m, m), (variance, new_v, v)):
                new = torch.where(moves, new, old)
                if shard.moments.packed:
                    new = new[is_open]
                moment[: len(new)] = new
            sums[1] += torch.where(moves, move, 0).double().square().sum()
        return sums


def _collected(shard: Shard, gradient: Tensor, statistic: str | None, where: slice) -> Tensor:
    """The gradient of the open weights, 0 where closed; it is added to the saliency as it was."""
    g = gradient[where]
    if statistic is not None:
        accumulate(shard.saliency[where], g, statistic)
    return torch.where(shard.opened[where] > 0, g, 0.0)
