"""Points that are far from one another. Letters: n points, D width."""

from __future__ import annotations

import torch
from torch import Tensor


def farthest_points(points: Tensor, start: Tensor, count: int) -> list[int]:
    """Indices of `count` points [n, D], each farthest from those before it and from `start` [D], by cosine (Gonzalez 1985, greedy k-center).

    Ties go to the first. All of them, in that order, where there are no more than `count`.
    """
    unit = torch.nn.functional.normalize(points.double(), dim=1)
    nearest = 1 - unit @ torch.nn.functional.normalize(start.double(), dim=0)  # [n], distance to the nearest chosen one
    chosen: list[int] = []
    for _ in range(min(count, len(points))):
        nearest[chosen] = -torch.inf
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, 1 - unit @ unit[chosen[-1]])
    return chosen
