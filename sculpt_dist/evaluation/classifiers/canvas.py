"""The canvas's own classifier. Its pooled features also serve FID and KID."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sculpt_dist.canvas.classifier import load_classifier
from sculpt_dist.canvas.world import IMAGE_SIZE, OBJECTS, STYLES
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.evaluation.classifiers.base import Classifier, Verdict, find_names, renumber


class Encoder:
    """The shipped canvas classifier, on the device of the images. Raises ModelError when its weights are missing."""

    def __init__(self) -> None:
        self.model = load_classifier()

    @torch.no_grad()
    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images [B, 3, h, w] -> object logits [B, 12], style logits [B, 5]."""
        objects, styles = self.model.to(images.device)(to_pixels(images))
        return objects, styles

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, h, w] -> [B, 128], the input of both heads of the classifier."""
        maps = self.model.to(images.device).features(to_pixels(images))  # [B, 64, 4, 4]
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)


class Judge(Classifier):
    """Names the objects and styles of the canvas world. Raises ConfigError for names outside that world."""

    def __init__(self, where: str, objects: Sequence[str], styles: Sequence[str]) -> None:
        super().__init__(where, objects, styles)
        if where:
            raise ConfigError(
                f"evaluate.classifier=canvas:{where}: the canvas classifier takes no folder: write canvas alone"
            )
        self._wanted_objects = find_names("evaluate.objects", objects, OBJECTS)
        self._wanted_styles = find_names("evaluate.styles", styles, STYLES)
        self._encoder = Encoder()

    def classify(self, images: Tensor) -> Verdict:
        """uint8 images [B, 3, h, w] of any size -> Verdict; classes that are not evaluated count as -1."""
        object_logits, style_logits = self._encoder.logits(images)
        seen_objects = renumber(object_logits.argmax(1), self._wanted_objects, len(OBJECTS))
        if not self.styles:
            return Verdict(seen_objects, None)
        return Verdict(seen_objects, renumber(style_logits.argmax(1), self._wanted_styles, len(STYLES)))


def to_pixels(images: Tensor) -> Tensor:
    """uint8 images [B, 3, h, w] -> float pixels [B, 3, 32, 32] in [-1, 1]; other sizes are resized by area."""
    pixels = images.float() / 127.5 - 1
    if images.shape[2:] == (IMAGE_SIZE, IMAGE_SIZE):
        return pixels
    return F.interpolate(pixels, size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")
