"""FID, the Frechet distance between the features of two sets of images (Heusel et al. 2017, arXiv 1706.08500):

|mean1 - mean2|^2 + Tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2))
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sculpt_dist.errors import ConfigError
from sculpt_dist.metrics.base import Metric

Features = Callable[[Tensor], Tensor]  # uint8 images [B, 3, h, w] -> [B, D]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
MAX_PIXELS = 25_000_000  # PIL itself only warns at 89 million, and a file of 12 kB can hold 100 million
IMAGE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # of 8 bits and less; transparency is dropped
BATCH = 32  # reference images whose features are taken together


class Score(Metric):
    """The Frechet distance from a folder of reference images; only figures of the same features and image counts compare.

    It is the canonical FID with Inception features only; with a canvas or CLIP encoder's `image_features` say which.
    """

    def __init__(self, reference: Path, features: Features) -> None:
        """Raises ConfigError when the folder holds fewer than 2 images, or one that cannot be used."""
        self._features = features
        self._reference = sums(reference_features(reference, features))
        self._state = {name: torch.zeros_like(total) for name, total in self._reference.items()}

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """uint8 images [B, 3, h, w]; the prompts do not matter."""
        for name, total in sums(self._features(images)).items():
            self._state[name] += total

    def state(self) -> Mapping[str, Tensor]:
        """Float64: sum [D], outer [D, D] (the sum of f f^T), count []."""
        return {name: total.clone() for name, total in self._state.items()}

    def result(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        """`fid`. Raises ConfigError when fewer than 2 images were drawn."""
        if state["count"] < 2:
            raise ConfigError(f"FID: {int(state['count'])} images were drawn, at least 2 are needed: raise evaluate.images")
        drawn = {name: total.to(self._reference[name]) for name, total in state.items()}
        return {"fid": float(frechet_distance(*moments(drawn), *moments(self._reference)))}


def sums(features: Tensor) -> dict[str, Tensor]:
    """Features [N, D] -> float64 on the CPU: sum [D], outer [D, D], count []."""
    features = features.cpu().double()
    count = torch.tensor(len(features), dtype=torch.float64)
    return {"sum": features.sum(0), "outer": features.T @ features, "count": count}


def moments(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sums -> the mean [D] and the unbiased covariance [D, D]."""
    mean = state["sum"] / state["count"]
    return mean, (state["outer"] - state["count"] * torch.outer(mean, mean)) / (state["count"] - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """Squared distance of two Gaussians: ([D], [D, D], [D], [D, D]) -> [].

    Tr((cov1 cov2)^(1/2)) is the sum of the singular values of cov1^(1/2) cov2^(1/2). Eigenvalues of cov1 cov2, as torchmetrics takes
    them, give the same with more images than features; with fewer, their rounding errors pass through a square root (1e-4 for D = 512).
    """
    overlap = torch.linalg.svdvals(_root(cov1) @ _root(cov2)).sum()
    return (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * overlap


def _root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def reference_features(folder: Path, features: Features) -> Tensor:
    """Float64 features [N, D] of all png and jpg images in the folder, at any depth, in the order of their paths.

    Raises ConfigError when there are fewer than 2, or when one is damaged, over 25 million pixels, or of more than 8 bits.
    """
    if not folder.is_dir():
        raise ConfigError(f"evaluate.reference={folder}: no such folder: give one that holds png or jpg images")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if len(files) < 2:
        raise ConfigError(f"evaluate.reference={folder}: holds {len(files)} png or jpg images, FID and KID need at least 2")
    parts = [features(images).cpu().double() for images in _batches(map(read_image, files))]
    return torch.cat(parts)


def read_image(file: Path) -> Tensor:
    """An image file -> uint8 [3, h, w]. Raises ConfigError that names the file."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ConfigError(f"{file}: {width} x {height} pixels, the limit is 25 million: make it smaller, or take it out")
            if image.mode not in IMAGE_MODES:
                raise ConfigError(f"{file}: has pixels of kind {image.mode}: save it with 8 bits per colour")
            pixels = np.array(image.convert("RGB"))  # [h, w, 3]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{file}: cannot be read as an image ({error}): replace it, or take it out") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _batches(images: Iterator[Tensor]) -> Iterator[Tensor]:
    """Consecutive images of equal size, stacked: [B, 3, h, w] with B at most BATCH."""
    for _, equal in itertools.groupby(images, key=lambda image: image.shape):
        while batch := list(itertools.islice(equal, BATCH)):
            yield torch.stack(batch)
