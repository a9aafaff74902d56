"""Stochastic rounding: what is too small for a number's bits still counts on average."""

from __future__ import annotations

import torch
from torch import Tensor


def round_to_bf16(values: Tensor, uniform: Tensor) -> Tensor:
    """float32 values, each rounded to one of the two bfloat16 numbers beside it, as float32; the mean is kept.

    `uniform`: of the same shape, in [0, 1); decides which of the two. The nearer number is the likelier one.
    """
    bits = values.float().contiguous().view(torch.int32)
    dropped = 1 << 16  # bfloat16 is the upper half of float32
    return ((bits + (uniform * dropped).to(torch.int32)) & -dropped).view(torch.float32)
