"""How several changes of one model are merged into one: their mean, their sum, or TIES."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merged_change(changes: Sequence[Tensor], how: str, thresholds: Sequence[float] | None = None) -> Tensor:
    """One change from several of equal shape, before it is scaled.

    mean: their mean. task: their sum (task arithmetic, Ilharco et al., arXiv 2212.04089). ties: of each change only
    what reaches its threshold in magnitude counts; a weight's sign is that of the sum of what is left; the mean of
    those that have this sign (Yadav et al., arXiv 2306.01708).
    """
    stacked = torch.stack([change.float() for change in changes])  # [K, ...]
    if how == "mean":
        return stacked.mean(0)
    if how == "task":
        return stacked.sum(0)
    assert how == "ties" and thresholds is not None
    limits = torch.tensor(thresholds).view(-1, *[1] * (stacked.dim() - 1))
    stacked = torch.where(stacked.abs() >= limits, stacked, 0.0)
    agrees = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def magnitude_threshold(changes: Sequence[Tensor], density: float) -> float:
    """The magnitude that the largest share `density` of all values of these tensors reaches; 0 < density <= 1."""
    magnitudes = torch.cat([change.flatten().float().abs() for change in changes])
    kept = max(1, round(density * len(magnitudes)))
    return magnitudes.kthvalue(len(magnitudes) - kept + 1).values.item()
