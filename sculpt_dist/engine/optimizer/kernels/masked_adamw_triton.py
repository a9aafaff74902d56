"""The masked step's Triton functions, which `gpu.py` launches. Compiling them needs triton, but no GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count(opened, counts, n, block: tl.constexpr):
    """The number of open weights in each block."""
    i = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(counts + tl.program_id(0), tl.sum((tl.load(opened + i, mask=i < n, other=0) > 0).to(tl.int64), 0))


@triton.jit
def add_to_saliency(saliency, i, live, g, statistic: tl.constexpr):
    """Add the gradient to the saliency."""
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
def collect(gradient, opened, saliency, squares, n, statistic: tl.constexpr, block: tl.constexpr):
    """Add the gradient to the saliency; `squares` [blocks] gets each block's sum of squares over open weights."""
    i = tl.program_id(0) * block + tl.arange(0, block)
    live = i < n
    g = tl.load(gradient + i, mask=live, other=0.0)
    add_to_saliency(saliency, i, live, g, statistic)
    g = tl.where(tl.load(opened + i, mask=live, other=0) > 0, g, 0.0)
    tl.store(squares + tl.program_id(0), tl.sum(g * g, 0))


@triton.jit
def update(
    gradient, opened, saliency, momentum, variance, weights, begins, squares, moves,
    scale, first, second, n, lr, beta1, beta2, epsilon, decay,
    statistic: tl.constexpr, packed: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """`collect`, and AdamW on the open weights.

    A packed moment's index is the number of open weights before it; `begins` [blocks + 1] counts them per block.
    """
    i = tl.program_id(0) * block + tl.arange(0, block)
    live = i < n
    g = tl.load(gradient + i, mask=live, other=0.0)
    add_to_saliency(saliency, i, live, g, statistic)
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
    moved = by == by  # False when the gradient was not finite: `scale` is NaN then
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
