"""The centre of an image of the concept is masked, and the unlearned model fills it in (arXiv 2505.17013).

At every step what lies outside the mask is the original image at that step's noise, so no inpainting net is needed.
Published: the middle 256 of 512 pixels. On 32 pixels the rest is enough for the classifier even where the model
never knew the concept, so more is masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt_dist.attacks.base import Attack as Base
from sculpt_dist.attacks.base import Attempt, Case
from sculpt_dist.attacks.parts.victim import Model, Victim
from sculpt_dist.backbones.parts.guidance import Guided
from sculpt_dist.core.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """The options of inpaint."""

    share: float = 0.75
    """Side of the masked square, as a share of the image's."""


PUBLISHED = {"share": 0.5}


class Attack(Base):
    needs_original = True
    config: Config

    def __init__(self, config: Config) -> None:
        if not 0 < config.share < 1:
            raise ConfigError(f"attack.options.inpaint.share={config.share}: must be above 0 and below 1")
        super().__init__(config)

    def attempts(self, victim: Victim, cases: Sequence[Case]) -> Iterator[Attempt]:
        model = victim.model
        for place, case in enumerate(cases):
            clean, noise = victim.reference(case), model.noise(case.seed)
            masked = centre(clean.shape, self.config.share).to(clean.device)
            predict = filling(model, model.guided(case), clean, noise, masked)
            yield Attempt(place, model.image(torch.where(masked, model.latents(predict, noise), clean)))


def filling(model: Model, guided: Guided, clean: Tensor, noise: Tensor, masked: Tensor) -> Guided:
    """A prediction for which everything outside the mask is the clean image [1, C, H, W] at the step's noise."""

    def predict(latents: Tensor, time: Tensor) -> Tensor:
        around = model.backbone.corrupt(clean, noise, time.to(clean.device).view(1))
        return guided(torch.where(masked, latents, around), time)

    return predict


def centre(shape: Sequence[int], share: float) -> Tensor:
    """True in a centred square of latents, bool [1, 1, H, W]."""
    height, width = shape[-2:]
    inside = torch.zeros(1, 1, height, width, dtype=torch.bool)
    top, left = (round(side * (1 - share) / 2) for side in (height, width))
    inside[..., top : height - top, left : width - left] = True
    return inside
