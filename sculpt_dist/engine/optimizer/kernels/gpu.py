"""The masked step on a GPU: one Triton kernel a span, one pass over memory; the host waits for nothing.

Triton's interpreter runs the same code on a CPU (TRITON_INTERPRET=1), which is how it is tested without a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_dist.engine.optimizer.kernels import Rule
from sculpt_dist.engine.sharding.moments import repack
from sculpt_dist.engine.sharding.shards import Shard

STATISTICS = {None: 0, "abs_sum": 1, "sum_abs": 2, "sum_sq": 3}
BLOCK = 1024

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def found() -> tuple[Gpu | None, str]:
    """(the kernel, "") or (None, why there is none)."""
    return (Gpu(), "") if triton is not None else (None, "triton is not installed")


class Gpu:
    """See `_update`. Sums are of blocks first: the order does not depend on the GPU's timing."""

    repack = staticmethod(repack)

    def collect(self, shard: Shard, gradient: Tensor, statistic: str | None) -> Tensor:
        sums = []
        for where in shard.spans:
            n = where.stop - where.start
            blocks = triton.cdiv(n, BLOCK)
            squares = torch.empty(blocks, device=gradient.device)
            _collect[(blocks,)](
                gradient[where],
                shard.opened[where],
                shard.saliency[where],
                squares,
                n,
                statistic=STATISTICS[statistic],
                block=BLOCK,
            )
            sums.append(squares.double().sum())
        return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=gradient.device)

    def update(self, shard: Shard, gradient: Tensor, statistic: str | None, rule: Rule) -> Tensor:
        sums = []
        for where, momentum, variance in shard.moments.pieces(shard.opened):
            n, opened = where.stop - where.start, shard.opened[where]
            blocks = triton.cdiv(n, BLOCK)
            begins = torch.zeros(
                blocks + 1, dtype=torch.int64, device=gradient.device
            )  # of each block among the open weights
            if shard.moments.packed:
                _count[(blocks,)](opened, begins[1:], n, block=BLOCK)
                begins = begins.cumsum(0)
            both = torch.empty(2, blocks, device=gradient.device)
            _update[(blocks,)](
                gradient[where], opened, shard.saliency[where], momentum, variance, shard.flat[where], begins, both[0], both[1],
                rule.scale, rule.first, rule.second, n, rule.lr, rule.beta1, rule.beta2, rule.epsilon, rule.decay,
                statistic=STATISTICS[statistic], packed=shard.moments.packed, block=BLOCK,
            )  # fmt: skip
            sums.append(both.double().sum(1))
        return torch.stack(sums).sum(0) if sums else torch.zeros(2, dtype=torch.float64, device=gradient.device)


if triton is not None:

    @triton.jit
    def _count(opened, counts, n, block: tl.constexpr):
        """How many weights of a block are open."""
        i = tl.program_id(0) * block + tl.arange(0, block)
        tl.store(counts + tl.program_id(0), tl.sum((tl.load(opened + i, mask=i < n, other=0) > 0).to(tl.int64), 0))

    @triton.jit
    def _added(saliency, i, live, g, statistic: tl.constexpr):
        """The gradient goes into the saliency."""
        if statistic > 0:
            s = tl.load(saliency + i, mask=live, other=0.0)
            if statistic == 1:
                s += g
            elif statistic == 2:
                s += tl.abs(g)
            else:
                s += g * g
            tl.store(saliency + i, s, mask=live)

    @triton.jit
    def _collect(gradient, opened, saliency, squares, n, statistic: tl.constexpr, block: tl.constexpr):
        i = tl.program_id(0) * block + tl.arange(0, block)
        live = i < n
        g = tl.load(gradient + i, mask=live, other=0.0)
        _added(saliency, i, live, g, statistic)
        g = tl.where(tl.load(opened + i, mask=live, other=0) > 0, g, 0.0)
        tl.store(squares + tl.program_id(0), tl.sum(g * g, 0))

    @triton.jit
    def _update(
        gradient, opened, saliency, momentum, variance, weights, begins, squares, moves,
        scale, first, second, n, lr, beta1, beta2, epsilon, decay,
        statistic: tl.constexpr, packed: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        """`_collect`, and AdamW of the open weights; packed moments are found by counting the open weights before them."""
        i = tl.program_id(0) * block + tl.arange(0, block)
        live = i < n
        g = tl.load(gradient + i, mask=live, other=0.0)
        _added(saliency, i, live, g, statistic)
        generation = tl.load(opened + i, mask=live, other=0).to(tl.int32)
        is_open = generation > 0
        g = tl.where(is_open, g, 0.0)
        tl.store(squares + tl.program_id(0), tl.sum(g * g, 0))
        if packed:
            held = is_open
            at = tl.load(begins + tl.program_id(0)) + tl.cumsum(is_open.to(tl.int32), 0) - 1
        else:
            held = live
            at = i
        by = tl.load(scale + tl.zeros([block], tl.int32))
        moved = by == by  # not where the gradient was not finite
        g = g * by
        m = tl.load(momentum + at, mask=held, other=0.0) * beta1 + g * (1 - beta1)
        v = tl.load(variance + at, mask=held, other=0.0) * beta2 + g * g * (1 - beta2)
        tl.store(momentum + at, m, mask=held & moved)
        tl.store(variance + at, v, mask=held & moved)
        w = tl.load(weights + i, mask=live, other=0.0)
        move = m * tl.load(first + generation) / (tl.sqrt(v) * tl.load(second + generation) + epsilon)
        move += tl.where(is_open, decay * w, 0.0)
        tl.store(weights + i, w - lr * move, mask=live & moved)
        tl.store(moves + tl.program_id(0), tl.sum(tl.where(live & moved, move * move, 0.0), 0))
