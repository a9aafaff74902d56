"""The saliency of a weight: what a mask ranks by. One flat tensor in, updated in place; no rank, no distribution."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate(saliency: Tensor, gradient: Tensor, statistic: str) -> None:
    """Add one reduced, unclipped gradient [n] to the running statistic [n].

    `abs_sum` keeps the signed sum (Sculpting Memory: gradients that cancel do not count), `sum_abs` and `sum_sq` the sums of
    magnitudes and squares.
    """
    if statistic == "abs_sum":
        saliency.add_(gradient)
    elif statistic == "sum_abs":
        saliency.add_(gradient.abs())
    else:
        assert statistic == "sum_sq", statistic
        saliency.addcmul_(gradient, gradient)


def sort_keys(saliency: Tensor) -> Tensor:
    """Non-negative int32 keys [n] in the order of |saliency| [n]: the bits of a non-negative fp32 sort like the number."""
    assert saliency.dtype == torch.float32
    return saliency.view(torch.int32) & 0x7FFFFFFF
