"""Image features that FID and KID compare, and the adapter that hands them to torchmetrics."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.data.images import IMAGE_TYPES, image_files, open_image

Features = Callable[[Tensor], Tensor]  # uint8 images [B, 3, h, w] -> [B, D]

BATCH = 32  # reference images per forward of the encoder
DRAWINGS_PER_PAIR = 20  # canvas drawings of each object in each style


class IdentityFeatures(nn.Module):
    """The feature network for torchmetrics: it receives features instead of images and returns them unchanged.

    The reference features are then computed once for all metrics, and the encoder stays on its device.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> the same [B, D]."""
        return features


def reference_features(folder: Path, features: Features) -> Tensor:
    """Float64 features [N, D] of all images in the folder and its subfolders, sorted by path.

    Raises ConfigError when there are fewer than 2 images, or when one cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"evaluate.reference={folder}: no such folder: name a folder of images ({', '.join(IMAGE_TYPES)})"
        )
    files, _ = image_files(folder)
    if len(files) < 2:
        raise ConfigError(
            f"evaluate.reference={folder}: holds {len(files)} images ({', '.join(IMAGE_TYPES)}), "
            "but FID and KID need at least 2"
        )
    return torch.cat([features(images).cpu().double() for images in _batches(map(_read, files))])


def drawn_features(features: Features) -> Tensor:
    """Float64 features [N, D] of canvas drawings of every object in every style."""
    return torch.cat([features(batch).cpu().double() for batch in _drawings().split(BATCH)])


@lru_cache(maxsize=1)
def _drawings() -> Tensor:  # uint8 [N, 3, 32, 32]
    from sculpt_dist.canvas.draw import draw_dataset

    return torch.from_numpy(draw_dataset(DRAWINGS_PER_PAIR, seed=0)[0]).permute(0, 3, 1, 2)


def _read(file: Path) -> Tensor:
    """An image file -> uint8 [3, h, w]."""
    return torch.from_numpy(np.array(open_image(file))).permute(2, 0, 1).contiguous()


def _batches(images: Iterator[Tensor]) -> Iterator[Tensor]:
    """Consecutive images of equal size, stacked: [B, 3, h, w] with B at most BATCH."""
    for _, equal in itertools.groupby(images, key=lambda image: image.shape):
        while batch := list(itertools.islice(equal, BATCH)):
            yield torch.stack(batch)
