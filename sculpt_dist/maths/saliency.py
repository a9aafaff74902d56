"""The saliency of weights, by which a mask ranks them. One flat tensor, updated in place; nothing distributed."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate(saliency: Tensor, gradient: Tensor, statistic: str) -> None:
    """Add one reduced, unclipped gradient [n] to the running statistic [n].

    `abs_sum` keeps the signed sum, so opposite gradients cancel (Sculpting Memory); `sum_abs` and `sum_sq` sum
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
    """Non-negative int32 keys [n] that sort like |saliency| [n]: the bits of a positive fp32 sort like its value."""
    assert saliency.dtype == torch.float32
    return saliency.view(torch.int32) & 0x7FFFFFFF
