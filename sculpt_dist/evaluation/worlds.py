"""What a world brings to an evaluation: its objects and styles, its classifiers, and their features for FID and KID."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.evaluation.classifiers.base import Classifier, Verdict, find_names, renumber
from sculpt_dist.worlds.base import World
from sculpt_dist.worlds.classifier import load_classifier
from sculpt_dist.worlds.find import shipped, world


class WorldEncoder:
    """A shipped classifier of a world, on the device of the images. Raises ModelError when its weights are missing."""

    def __init__(self, name: str, part: str = "classifier") -> None:
        self.world, self.file = world(name), shipped(name, f"{part}.safetensors")
        self.model = load_classifier(self.world, part, self.file)

    @torch.no_grad()
    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images [B, 3, h, w] -> object logits [B, objects], style logits [B, styles]."""
        objects, styles = self.model.to(images.device)(to_pixels(images, self.world.image_size))
        return objects, styles

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, h, w] -> [B, D], the input of both heads of the classifier."""
        return self.model.to(images.device).pooled(to_pixels(images, self.world.image_size))


class WorldJudge(Classifier):
    """Names the objects and styles of its world. Raises ConfigError for names outside that world.

    A subclass, in a file of `classifiers/`, names the world.
    """

    name: str  # of the world

    def __init__(self, where: str, objects: Sequence[str], styles: Sequence[str]) -> None:
        """`where`: one of the world's classifiers; "" is the first."""
        super().__init__(where, objects, styles)
        known: World = world(self.name)
        if where and where not in known.classifiers:
            raise ConfigError(
                f"evaluate.classifier={self.name}:{where}: the classifiers of this world are "
                f"{', '.join(known.classifiers)}; {self.name} alone is the first"
            )
        listing = f"sculpt-dist {self.name} list"
        self._wanted_objects = find_names("evaluate.objects", objects, known.objects, listing)
        self._wanted_styles = find_names("evaluate.styles", styles, known.styles, listing)
        self._encoder = WorldEncoder(self.name, where or next(iter(known.classifiers)))

    def classify(self, images: Tensor) -> Verdict:
        """uint8 images [B, 3, h, w] of any size -> Verdict; classes that are not evaluated count as -1."""
        object_logits, style_logits = self._encoder.logits(images)
        seen_objects = renumber(object_logits.argmax(1), self._wanted_objects, object_logits.shape[1])
        if not self.styles:
            return Verdict(seen_objects, None)
        return Verdict(seen_objects, renumber(style_logits.argmax(1), self._wanted_styles, style_logits.shape[1]))


def to_pixels(images: Tensor, size: int) -> Tensor:
    """uint8 images [B, 3, h, w] -> float pixels [B, 3, size, size] in [-1, 1]; other sizes are resized by area."""
    pixels = images.float() / 127.5 - 1
    if images.shape[2:] == (size, size):
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="area")


def encoder_file(name: str) -> Path:
    """The file that decides the features of a world's classifier."""
    return shipped(name, "classifier.safetensors")
