"""KID, the kernel distance between the features of two sets of images (Binkowski et al. 2018, arXiv 1801.01401, eq. 4), by torchmetrics:

mean over i != j of k(x_i, x_j)  +  mean over i != j of k(y_i, y_j)  -  2 mean over i, j of k(x_i, y_j),   k(x, y) = (x.y / D + 1)^3
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics.image.kid import KernelInceptionDistance

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.evaluation.metrics.base import Metric
from sculpt_dist.evaluation.metrics.features import Features, IdentityFeatures

SUBSET_SIZE = 1000  # images of each set that are compared at once, and
SUBSETS = 100  # how often others are picked; both are torchmetrics' defaults, and the paper's size
SEED = 0


class Score(Metric):
    """The mean of the unbiased estimate over random subsets, each as large as the smaller set but at most 1000 images.

    Two sets of one size of at most 1000 are compared once, over all pairs. Otherwise the 100 subsets are picked with a fixed seed from
    images in an order of their own, so that the result depends neither on other random draws nor on how ranks share the images. Being
    unbiased, the estimate may be a little below 0, and for equal sets it is: there the pairs of an image with itself count only across.

    Every pair of drawn images counts, also of images from different ranks, and sums cannot say that. So the state is the table of
    all features, in which each rank fills its own rows and leaves the others 0: adding the tables of all ranks joins them.
    """

    def __init__(self, reference: Tensor, features: Features, num_images: int, first: int = 0) -> None:
        """`reference` holds the features of at least 2 images, float64 [N, D].

        `num_images` rows are enough for all ranks, and this rank fills those from `first` on; rows left empty do no harm.
        """
        self._features = features
        self._reference = reference
        self._table = torch.zeros(num_images, reference.shape[1], dtype=torch.float64)  # [num_images, D]
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
        drawn = state["features"].cpu()[filled == 1]  # [M, D]
        if len(drawn) < 2:
            raise ConfigError(f"KID: {len(drawn)} images were drawn, at least 2 are needed: raise evaluate.images")
        drawn = drawn[torch.from_numpy(np.lexsort(drawn.T.numpy()))]
        return {"kid": _kernel_distance(self._reference, drawn)}


def _kernel_distance(reference: Tensor, drawn: Tensor) -> float:
    size = min(SUBSET_SIZE, len(reference), len(drawn))
    subsets = 1 if size == len(reference) == len(drawn) else SUBSETS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        kid = KernelInceptionDistance(
            IdentityFeatures(reference.shape[1]), subsets, size, sync_on_compute=False
        )  # the ranks are joined already
    kid.update(reference, real=True)
    kid.update(drawn, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            SEED
        )  # the CPU's alone, as torch.manual_seed would reseed the accelerators too
        return float(kid.compute()[0])
