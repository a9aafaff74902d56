"""Choosing points that are far from each other. Letters: n points, D width."""

from __future__ import annotations

import torch
from torch import Tensor


def farthest_points(points: Tensor, start: Tensor, count: int) -> list[int]:
    """Indices of `count` of the points [n, D], each the farthest from `start` [D] and those before it.

    Distances are cosine distances. This is the greedy k-center algorithm (Gonzalez 1985). Ties go to the first point.
    Returns all points, in that order, when there are at most `count`.
    """
    unit = torch.nn.functional.normalize(points.double(), dim=1)
    nearest = 1 - unit @ torch.nn.functional.normalize(start.double(), dim=0)  # [n], distance to the nearest chosen one
    chosen: list[int] = []
    for _ in range(min(count, len(points))):
        nearest[chosen] = -torch.inf
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, 1 - unit @ unit[chosen[-1]])
    return chosen
