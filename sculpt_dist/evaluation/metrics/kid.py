"""KID, the kernel distance between the features of two image sets (Binkowski et al. 2018, arXiv 1801.01401, eq. 4):

mean over i != j of k(x_i, x_j)  +  mean over i != j of k(y_i, y_j)  -  2 mean over i, j of k(x_i, y_j),
k(x, y) = (x.y / D + 1)^3

torchmetrics computes it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.evaluation.features import Features, IdentityFeatures
from sculpt_dist.evaluation.metrics.base import Metric, MetricContext, NoOptions

SUBSET_SIZE = 1000  # images of each set per comparison, as in the paper and in torchmetrics
SUBSETS = 100  # number of comparisons, torchmetrics' default
SEED = 0


def build(context: MetricContext, options: NoOptions | None) -> Score | None:
    """The KID from the images of `evaluate.reference`; without it, None."""
    context.require("reference", options)
    if context.reference is None:
        return None
    return Score(context.reference, context.features, context.num_images, context.first)


class Score(Metric):
    """The mean of the unbiased estimate over random subsets, each as large as the smaller set but at most 1000 images.

    Two sets of the same size, at most 1000, are compared once over all pairs. Otherwise 100 subsets are drawn with a
    fixed seed after sorting the images, so the result depends neither on other random draws nor on how ranks share the
    images. An unbiased estimate can fall slightly below 0. For equal sets it always does, because only the cross term
    pairs an image with itself.

    Every pair of drawn images counts, including pairs across ranks, and sums cannot express that. The state is
    therefore the table of all features: each rank fills its own rows and leaves the others 0, and adding the tables
    joins them.
    """

    def __init__(self, reference: Tensor, features: Features, num_images: int, first: int = 0) -> None:
        """`reference` holds the features of at least 2 images, float64 [N, D].

        The table has `num_images` rows for all ranks; this rank fills rows from `first` on. Rows may stay empty.
        """
        self._features = features
        self._reference = reference
        self._table = torch.zeros(num_images, reference.shape[1], dtype=torch.float64)  # [num_images, D]
        self._filled = torch.zeros(num_images, dtype=torch.float64)  # [num_images], 1 = filled
        self._next = first

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """uint8 images [B, 3, h, w]; the prompts are ignored."""
        end = self._next + len(images)
        assert end <= len(self._table), f"images {self._next} to {end} do not fit into {len(self._table)} rows"
        self._table[self._next : end] = self._features(images).cpu().double()
        self._filled[self._next : end] = 1
        self._next = end

    def state(self) -> Mapping[str, Tensor]:
        """Float64: features [num_images, D], filled [num_images]; 8 D bytes per image."""
        return {"features": self._table.clone(), "filled": self._filled.clone()}

    def result(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        """`kid`, not multiplied by 1000. Raises ConfigError when fewer than 2 images were drawn."""
        filled = state["filled"].cpu()
        assert filled.max() <= 1, "two ranks filled the same rows: give each its own `first`"
        drawn = state["features"].cpu()[filled == 1]  # [M, D]
        if len(drawn) < 2:
            raise ConfigError(f"KID: {len(drawn)} images were drawn, but at least 2 are needed: raise evaluate.images")
        drawn = drawn[torch.from_numpy(np.lexsort(drawn.T.numpy()))]
        return {"kid": _kernel_distance(self._reference, drawn)}


def _kernel_distance(reference: Tensor, drawn: Tensor) -> float:
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(SUBSET_SIZE, len(reference), len(drawn))
    subsets = 1 if size == len(reference) == len(drawn) else SUBSETS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        identity = IdentityFeatures(reference.shape[1])
        kid = KernelInceptionDistance(identity, subsets, size, sync_on_compute=False)  # the tables are already joined
    kid.update(reference, real=True)
    kid.update(drawn, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)  # the CPU's alone; torch.manual_seed would also reseed accelerators
        return float(kid.compute()[0])
