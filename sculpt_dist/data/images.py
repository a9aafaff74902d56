"""Reading the user's image files: which types count, how large they may be, and the errors for bad files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from sculpt_dist.config.checks import normal
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.data.remote import is_remote, local_copy

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_TYPES = ".png .jpg .jpeg .jfif .webp .gif .bmp .tif .tiff".split()
FORMATS = "PNG JPEG WEBP GIF BMP TIFF".split()  # by content: Pillow would hand others to outside programs
MAX_PIXELS = 25_000_000  # PIL only warns, from 89 million on; a file of 12 kB can hold 100 million pixels
IMAGE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits per channel or less


def image_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images in a folder and below it, by name, and the other files; hidden files count as neither."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]  # links may go round
        seen.add(real)
        found += [Path(place, name) for name in names if not name.startswith(".") and Path(place, name).is_file()]
    found.sort()
    images = [path for path in found if path.suffix.lower() in IMAGE_TYPES]
    return images, [path for path in found if path.suffix.lower() not in IMAGE_TYPES]


def own_images(folder: str | None, name: str | None) -> tuple[list[Path], list[Path]]:
    """The user's images of a concept, in the subfolder of that name, and the files there that are not read.

    `folder` may be a URL.

    Case, spaces and underscores in the subfolder's name do not matter. Both are empty where there is none. Raises
    ConfigError where `folder` does not exist, where two subfolders fit, and for one without images.
    """
    if folder is None or name is None:
        return [], []
    if is_remote(folder):
        folder = str(local_copy(folder))
    if not Path(folder).is_dir():
        raise ConfigError(
            f"prepare.images={folder}: there is no such folder; it should contain one subfolder of images per concept"
        )
    fitting = _subfolders(folder, os.stat(folder).st_mtime_ns).get(_plain(name), [])
    if len(fitting) > 1:
        raise ConfigError(f"prepare.images={folder}: {fitting[0].name} and {fitting[1].name} are one name: merge them")
    if not fitting:
        return [], []
    images, others = image_files(fitting[0])
    if not images:
        raise ConfigError(f"{fitting[0]}: contains no image ({', '.join(IMAGE_TYPES)}); add some or remove the folder")
    return images, others


@lru_cache(4)
def _subfolders(folder: str, changed: int) -> dict[str, list[Path]]:
    """The subfolders by their plain names; `changed`: when a subfolder was last added or removed, in ns."""
    found: dict[str, list[Path]] = {}
    for path in sorted(Path(folder).iterdir()):
        if path.is_dir():
            found.setdefault(_plain(path.name), []).append(path)
    return found


def _plain(name: str) -> str:
    return normal(name.replace("_", " "))


def open_image(path: Path) -> Image.Image:
    """Read the whole image as RGB, without its transparency. Raises ConfigError as `check_image`."""
    with _opened(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def check_image(path: Path) -> None:
    """Read type and size of an image.

    Raises ConfigError with the file's name if it is not an image, is damaged, has over 25 million pixels, or has more
    than 8 bits per channel.
    """
    with _opened(path):
        pass


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ConfigError(
                    f"{path}: has {width} x {height} pixels, over the limit of {MAX_PIXELS}: "
                    "make it smaller, or remove it"
                )
            if image.mode not in IMAGE_MODES:
                raise ConfigError(f"{path}: has the pixel format {image.mode}: save it with 8 bits per channel")
            yield image
    except ConfigError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them raise
        raise ConfigError(f"{path}: cannot be read as an image ({error}): replace it, or remove it") from error


def read_image(path: Path, side: int) -> tuple[Tensor, tuple[int, int]]:
    """An image as [3, side, side] in [-1, 1], and its original (height, width). Raises ConfigError naming the file."""
    import numpy as np
    import torch

    image = open_image(path)
    square = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1, (image.height, image.width)
