"""Where a concept is in an image: the frozen net's attention to its name, or the user's masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.data.images import read_image

SIDE = 256  # pixels to which masks are resized and cropped, as images are
THRESHOLD = 0.5  # of the largest attention


def attended(maps: Tensor) -> Tensor:
    """Where the mean attention over heads and tokens is above half of its maximum, [B, heads, N, n] -> [B, 1, N, 1]."""
    mean = maps.float().mean((1, 3), keepdim=True)
    return (mean > THRESHOLD * mean.amax(2, keepdim=True)).to(maps)


def within(maps: Tensor, masks: Mapping[int, Tensor], samples: Sequence[int]) -> Tensor:
    """The maps [B, heads, N, n] of these samples in their regions alone, which are read at the resolution of the maps.

    Raises ConfigError for a sample without a region.
    """
    lacking = [number for number in samples if number not in masks]
    if lacking:
        raise ConfigError(f"method.masks: has no region {lacking[0]}.png for this sample of the target")
    side = round(maps.shape[2] ** 0.5)
    regions = [interpolate(masks[number][None, None], (side, side)).view(1, 1, -1, 1) for number in samples]
    return maps * (torch.cat(regions).to(maps) > 0.5)


def read_masks(folder: str, target: str) -> dict[int, Tensor]:
    """The regions of a target's samples by their number: FOLDER/TARGET/NUMBER.png -> [SIDE, SIDE] in
    [0, 1].

    Raises ConfigError where there are none, or a name is no number.
    """
    files = sorted((Path(folder) / target).glob("*.png"))
    if not files or not all(file.stem.isdigit() for file in files):
        raise ConfigError(f"method.masks={folder}: has no files {target}/NUMBER.png, one for each sample of the target")
    return {int(file.stem): read_image(file, SIDE)[0].mean(0) / 2 + 0.5 for file in files}
