"""CLIP score: the mean of 100 cos(image, prompt) over images.

Hessel et al. 2021, arXiv 2104.08718, eq. 1, in the scaling of published tables: 100 in place of 2.5, and no floor at 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.evaluation.classifiers.clip import Encoder
from sculpt_dist.evaluation.metrics.base import Metric


class Score(Metric):
    """How well images fit the prompts that they were drawn with, by the encoder given; say which one beside the figure.

    It is ours, as torchmetrics' CLIPScore loads models by their hub names, fails on what transformers 5 returns for their features (an
    object, not a tensor), and gives no standard error. On the same embeddings, handed over by an adapter, its mean is the same.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._state = {name: torch.zeros((), dtype=torch.float64) for name in ("sum", "sum_of_squares", "count")}

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """uint8 images [B, 3, h, w] and their B prompts."""
        assert len(images) == len(prompts), f"{len(images)} images, {len(prompts)} prompts"
        image_features = self._encoder.image_features(images).cpu().double()  # [B, D]
        distinct = list(dict.fromkeys(prompts))
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])  # [B]
        text_features = self._encoder.text_features(distinct).cpu().double()[rows]  # [B, D]
        scores = 100 * torch.cosine_similarity(image_features, text_features)  # [B]
        self._state["sum"] += scores.sum()
        self._state["sum_of_squares"] += scores.square().sum()
        self._state["count"] += len(scores)

    def state(self) -> Mapping[str, Tensor]:
        """Float64 scalars: sum, sum_of_squares, count."""
        return {name: total.clone() for name, total in self._state.items()}

    def result(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        """`clip_score`, the mean in [-100, 100], and `clip_score_error`, its standard error. Raises ConfigError without an image."""
        count, total, squares = (float(state[name]) for name in ("count", "sum", "sum_of_squares"))
        if not count:
            raise ConfigError("CLIP score: there is no image to score: raise evaluate.images")
        mean = total / count
        variance = max(0.0, squares / count - mean * mean)
        return {"clip_score": mean, "clip_score_error": math.sqrt(variance / max(1.0, count - 1))}
