"""CLIP score: the mean over images of 100 cos(image, prompt).

Hessel et al. 2021, arXiv 2104.08718, eq. 1, scaled as in published tables: 100 instead of 2.5, and no floor at 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.evaluation.metrics.base import Metric, MetricContext, NoOptions


class Encoder(Protocol):
    """Embeds images and prompts into one space."""

    def image_features(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, h, w] -> [B, D]."""

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """N prompts -> [N, D]."""


def build(context: MetricContext, options: NoOptions | None) -> Score | None:
    """The CLIP score of the model in `evaluate.clip`; without one, None."""
    context.require("clip", options)
    return None if context.clip is None else Score(context.clip)


class Score(Metric):
    """How well images fit their prompts according to an encoder; report the encoder along with the number.

    torchmetrics' CLIPScore is not used: it loads models by their hub names, fails on the object (not a tensor) that
    transformers 5 returns as features, and gives no standard error. On equal embeddings its mean equals this one.
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
        """`clip_score`, the mean in [-100, 100], and `clip_score_error`, its standard error.

        Raises ConfigError when no image was scored.
        """
        count, total, squares = (float(state[name]) for name in ("count", "sum", "sum_of_squares"))
        if not count:
            raise ConfigError("CLIP score: there is no image to score: raise evaluate.images")
        mean = total / count
        variance = max(0.0, squares / count - mean * mean)
        return {"clip_score": mean, "clip_score_error": math.sqrt(variance / max(1.0, count - 1))}
