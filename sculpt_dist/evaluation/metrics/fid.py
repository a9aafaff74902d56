"""FID, the Frechet distance between the features of two sets of images (Heusel et al. 2017, arXiv 1706.08500), by torchmetrics:

|mean1 - mean2|^2 + Tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.evaluation.metrics.base import Metric
from sculpt_dist.evaluation.metrics.features import Features, IdentityFeatures

SUMS = ("fake_features_sum", "fake_features_cov_sum", "fake_features_num_samples")  # what torchmetrics calls them


class Score(Metric):
    """The Frechet distance from reference images; only figures of the same features and image counts compare.

    It is the canonical FID with Inception features only; with a canvas or CLIP encoder's `image_features` say which.

    Accuracy: torchmetrics takes square roots of the eigenvalues of cov1 cov2, in float64. With more images than features the result is
    good to about 1e-10 of the features' total variance. With fewer, most eigenvalues are rounding errors whose roots add up, and it is
    good to about 1e-7: for equal sets of 100 images with 768 features of variance 1 it was -1.1e-4. What falls below 0 becomes 0.
    """

    def __init__(self, reference: Tensor, features: Features) -> None:
        """`reference` holds the features of at least 2 images, float64 [N, D]."""
        self._features = features
        # Each rank computes from sums over all ranks; left to itself, torchmetrics would add the ranks up once more.
        self._fid = FrechetInceptionDistance(feature=IdentityFeatures(reference.shape[1]), sync_on_compute=False)
        self._fid.update(reference, real=True)

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """uint8 images [B, 3, h, w]; the prompts do not matter."""
        self._fid.update(self._features(images).cpu().double(), real=False)

    def state(self) -> Mapping[str, Tensor]:
        """Torchmetrics' sums in float64: features [D], f f^T [D, D], images []."""
        return {name: getattr(self._fid, name).to(torch.float64, copy=True) for name in SUMS}

    def result(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        """`fid`. Raises ConfigError when fewer than 2 images were drawn."""
        count = int(state["fake_features_num_samples"])
        if count < 2:
            raise ConfigError(f"FID: {count} images were drawn, at least 2 are needed: raise evaluate.images")
        summed = self._fid.clone()
        for name in SUMS:
            setattr(summed, name, state[name].to(getattr(summed, name)))
        return {"fid": float(summed.compute().clamp_min(0))}
