"""The scores of images as such that a configuration asks for: CLIPScore, FID and KID."""

from __future__ import annotations

from pathlib import Path

from sculpt_dist.config.schema import EvaluateConfig
from sculpt_dist.evaluation.metrics.base import Metric


def image_metrics(settings: EvaluateConfig, num_images: int, first: int) -> list[Metric]:
    """CLIPScore where `evaluate.clip` names a model, FID and KID where `evaluate.reference` names a folder of images, or canvas.

    FID and KID use the features of `evaluate.clip`, or else of the canvas classifier. At most `num_images` are drawn by all ranks, and
    this rank's KID rows begin at `first`. Raises ConfigError or ModelError for a folder that cannot be used.
    """
    metrics: list[Metric] = []
    clip = None
    if settings.clip:
        from sculpt_dist.evaluation.classifiers.clip import Encoder
        from sculpt_dist.evaluation.metrics import clip_score

        clip = Encoder(settings.clip)
        metrics.append(clip_score.Score(clip))
    if settings.reference:
        from sculpt_dist.evaluation.classifiers import canvas
        from sculpt_dist.evaluation.metrics import fid, kid
        from sculpt_dist.evaluation.metrics.features import drawn_features, reference_features

        features = (clip or canvas.Encoder()).image_features
        drawn = settings.reference == "canvas"
        reference = (
            drawn_features(features) if drawn else reference_features(Path(settings.reference), features)
        )  # [N, D]
        metrics.append(fid.Score(reference, features))
        metrics.append(kid.Score(reference, features, num_images, first))
    return metrics
