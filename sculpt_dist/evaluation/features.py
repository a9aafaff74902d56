"""Image features that FID and KID compare, and the adapter that hands them to torchmetrics."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import file_sha256, make_folder, text_sha256, write_atomically
from sculpt_dist.data.images import IMAGE_TYPES, check_image, image_files, open_image
from sculpt_dist.worlds.find import reference_images, worlds

if TYPE_CHECKING:
    from sculpt_dist.engine.group import Group

Features = Callable[[Tensor], Tensor]  # uint8 images [B, 3, h, w] -> [B, D]

BATCH = 32  # reference images per forward of the encoder
_remembered: dict[str, Tensor] = {}  # features of this process, by what decides them


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


def reference_features(where: str | Path, features: Features) -> Tensor:
    """Float64 features [N, D] of all reference images; see `reference_chunks`."""
    return torch.cat([_features_of(chunk, features) for chunk in reference_chunks(where)])


def first_reference_features(where: str | Path, features: Features) -> Tensor:
    """Those of two reference images, [2, D], and a look at the type and size of all: can they be used?"""
    chunks = reference_chunks(where)
    for file in (file for chunk in chunks if isinstance(chunk, list) for file in chunk):
        check_image(file)
    return _features_of(chunks[0][:2], features)


def shared_reference_features(
    where: str, features: Features, encoder: Sequence[Path], group: Group, device: torch.device, folder: str | None
) -> Tensor:
    """Float64 features [N, D] of all reference images, on every rank: each computes some of them, on its device.

    They are remembered in this process, and in a file of `folder` for other runs. The files of the `encoder`, the
    images and the kind of device decide them. All ranks enter.
    """
    key = group.on_first(lambda: _key(where, encoder, device))
    if key in _remembered:
        return _remembered[key]
    file = None if folder is None else Path(folder).expanduser() / f"features-{key[:24]}.safetensors"
    found = group.on_first(lambda: None if file is None else _read_features(file))
    if found is None:
        chunks = group.on_first(lambda: reference_chunks(where))
        own = chunks[group.rank :: group.size]
        of_ranks = group.to_all(group.together(lambda: [_features_of(chunk, features, device) for chunk in own]))
        found = torch.cat([of_ranks[i % group.size][i // group.size] for i in range(len(chunks))])
        if file is not None:
            group.on_first(lambda: _write_features(file, found))
    _remembered[key] = found
    return found


def reference_chunks(where: str | Path) -> list[Any]:
    """The images of `evaluate.reference` in parts of at most 32: files of a folder and its subfolders, sorted by path,
    or, for the name of a world, its own images of every object in every style, uint8 [B, 3, h, w].

    Raises ConfigError when there are fewer than 2 images.
    """
    if where in worlds():
        return list(_images_of(str(where)).split(BATCH))
    if not Path(where).is_dir():
        raise ConfigError(
            f"evaluate.reference={where}: no such folder: name a folder of images ({', '.join(IMAGE_TYPES)})"
        )
    files, _ = image_files(Path(where))
    if len(files) < 2:
        raise ConfigError(
            f"evaluate.reference={where}: holds {len(files)} images ({', '.join(IMAGE_TYPES)}), "
            "but FID and KID need at least 2"
        )
    return [files[first : first + BATCH] for first in range(0, len(files), BATCH)]


def _features_of(chunk: Any, features: Features, device: torch.device | str = "cpu") -> Tensor:
    """Raises ConfigError when an image cannot be read."""
    batches = [chunk] if isinstance(chunk, Tensor) else _equally_large(map(_read, chunk))
    return torch.cat([features(batch.to(device)).cpu().double() for batch in batches])


def _key(where: str, encoder: Sequence[Path], device: torch.device) -> str:
    images = [where, _digest(_images_of(where))] if where in worlds() else _checksums(image_files(Path(where))[0])
    return text_sha256(json.dumps([images, _checksums(encoder), device.type]))


def _checksums(files: Sequence[Path]) -> list[str]:
    return [_checksum(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


@lru_cache(maxsize=1_000_000)
def _checksum(file: Path, size: int, changed: int) -> str:
    return file_sha256(file)


def _read_features(file: Path) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as content:
            found: Tensor = content.get_tensor("features")
            return found if (content.metadata() or {}).get("sha256") == _digest(found) else None
    except (OSError, SafetensorError):
        return None


def _write_features(file: Path, features: Tensor) -> None:
    from safetensors.torch import save

    make_folder(file.parent)
    write_atomically(file, save({"features": features.contiguous()}, {"sha256": _digest(features)}))


def _digest(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().numpy().tobytes()).hexdigest()


@lru_cache(maxsize=1)
def _images_of(world: str) -> Tensor:  # uint8 [N, 3, h, w]
    return torch.from_numpy(reference_images(world)).permute(0, 3, 1, 2)


def _read(file: Path) -> Tensor:
    """An image file -> uint8 [3, h, w]."""
    return torch.from_numpy(np.array(open_image(file))).permute(2, 0, 1).contiguous()


def _equally_large(images: Iterator[Tensor]) -> Iterator[Tensor]:
    """Consecutive images of equal size, stacked: [B, 3, h, w] with B at most BATCH."""
    for _, equal in itertools.groupby(images, key=lambda image: image.shape):
        while batch := list(itertools.islice(equal, BATCH)):
            yield torch.stack(batch)
