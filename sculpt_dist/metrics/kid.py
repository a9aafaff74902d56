"""KID, the kernel distance between the features of two sets of images (Binkowski et al. 2018, arXiv 1801.01401, eq. 4):

mean over i != j of k(x_i, x_j)  +  mean over i != j of k(y_i, y_j)  -  2 mean over i, j of k(x_i, y_j),   k(x, y) = (x.y / D + 1)^3
"""

from __future__ import annotations

from pathlib import Path
from typing import Mapping, Sequence

import torch
from torch import Tensor

from sculpt_dist.errors import ConfigError
from sculpt_dist.metrics.base import Metric
from sculpt_dist.metrics.fid import Features, reference_features

CHUNK = 1024  # rows of the kernel matrix that are in memory together


class Score(Metric):
    """The unbiased estimate over all pairs, not over random subsets, so it depends on no random draw; it may be a little below 0.

    Every pair of drawn images counts, also of images from different ranks, and sums cannot say that. So the state is the table of
    all features, in which each rank fills its own rows and leaves the others 0: adding the tables of all ranks joins them.
    """

    def __init__(self, reference: Path, features: Features, num_images: int, first: int = 0) -> None:
        """`num_images` rows are enough for all ranks, and this rank fills those from `first` on; rows left empty do no harm.

        Raises ConfigError when the folder holds fewer than 2 images, or one that cannot be used.
        """
        self._features = features
        self._reference = reference_features(reference, features)  # [N, D]
        self._table = torch.zeros(num_images, self._reference.shape[1], dtype=torch.float64)  # [num_images, D]
        self._filled = torch.zeros(num_images, dtype=torch.float64)  # [num_images], 1 = filled
        self._next = first

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """uint8 images [B, 3, h, w]; the prompts do not matter."""
        end = self._next + len(images)
        assert end <= len(self._table), f"images {self._next} to {end} do not fit into {len(self._table)} rows"
        self._table[self._next : end] = self._features(images).cpu().double()
        self._filled[self._next : end] = 1
        self._next = end

    def state(self) -> Mapping[str, Tensor]:
        """Float64: features [num_images, D], filled [num_images]; 8 D bytes for each image."""
        return {"features": self._table.clone(), "filled": self._filled.clone()}

    def result(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        """`kid`, not multiplied by 1000. Raises ConfigError when fewer than 2 images were drawn."""
        filled = state["filled"].cpu()
        assert filled.max() <= 1, "two ranks filled the same rows: give each its own `first`"
        drawn = state["features"].to(self._reference)[filled == 1]  # [M, D]
        if len(drawn) < 2:
            raise ConfigError(f"KID: {len(drawn)} images were drawn, at least 2 are needed: raise evaluate.images")
        return {"kid": float(kernel_distance(drawn, self._reference))}


def kernel_distance(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy: features [M, D], [N, D] -> []; M and N are at least 2 and may differ."""
    across = _kernel_sum(x, y) / (len(x) * len(y))
    return _mean_of_pairs(x) + _mean_of_pairs(y) - 2 * across


def _mean_of_pairs(x: Tensor) -> Tensor:
    with_itself = _kernel(x.square().sum(1), x.shape[1]).sum()
    return (_kernel_sum(x, x) - with_itself) / (len(x) * (len(x) - 1))


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([_kernel(rows @ y.T, x.shape[1]).sum() for rows in x.split(CHUNK)]).sum()


def _kernel(products: Tensor, width: int) -> Tensor:
    return (products / width + 1).pow(3)
