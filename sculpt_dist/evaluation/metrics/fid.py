"""FID, the Frechet distance between the features of two image sets (Heusel et al. 2017, arXiv 1706.08500):

|mean1 - mean2|^2 + Tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2))

torchmetrics computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.evaluation.features import Features, IdentityFeatures
from sculpt_dist.evaluation.metrics.base import Metric, MetricContext, NoOptions

SUMS = ("fake_features_sum", "fake_features_cov_sum", "fake_features_num_samples")  # torchmetrics' names


def build(context: MetricContext, options: NoOptions | None) -> Score | None:
    """The FID from the images of `evaluate.reference`; without it, None."""
    context.require("reference", options)
    return None if context.reference is None else Score(context.reference, context.features)


class Score(Metric):
    """The Frechet distance from reference images. Compare only numbers with the same features and image counts.

    Only Inception features give the canonical FID; with a canvas or CLIP encoder, report which one was used.

    Accuracy: torchmetrics takes square roots of the eigenvalues of cov1 cov2 in float64. With more images than
    features, the result is accurate to about 1e-10 of the features' total variance. With fewer images, most eigenvalues
    are rounding errors whose roots add up, and the accuracy is about 1e-7: for equal sets of 100 images with 768
    features of variance 1, the result was -1.1e-4. Negative results become 0.
    """

    def __init__(self, reference: Tensor, features: Features) -> None:
        """`reference` holds the features of at least 2 images, float64 [N, D]."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        self._features = features
        # Each rank computes from sums over all ranks; by default torchmetrics would add up the ranks a second time.
        self._fid = FrechetInceptionDistance(feature=IdentityFeatures(reference.shape[1]), sync_on_compute=False)
        self._fid.update(reference, real=True)

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """uint8 images [B, 3, h, w]; the prompts are ignored."""
        self._fid.update(self._features(images).cpu().double(), real=False)

    def state(self) -> Mapping[str, Tensor]:
        """torchmetrics' sums in float64: features [D], f f^T [D, D], images []."""
        return {name: getattr(self._fid, name).to(torch.float64, copy=True) for name in SUMS}

    def result(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        """`fid`. Raises ConfigError when fewer than 2 images were drawn."""
        count = int(state["fake_features_num_samples"])
        if count < 2:
            raise ConfigError(f"FID: {count} images were drawn, but at least 2 are needed: raise evaluate.images")
        summed = self._fid.clone()
        for name in SUMS:
            setattr(summed, name, state[name].to(getattr(summed, name)))
        return {"fid": float(summed.compute().clamp_min(0))}
