"""Reading of the user's image files: one place for which files count, how large they may be, and what is said of bad ones."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from sculpt_dist.core.errors import ConfigError

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 25_000_000  # PIL itself only warns at 89 million, and a file of 12 kB can hold 100 million
IMAGE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # of 8 bits and less


def open_image(path: Path) -> Image.Image:
    """The whole image in memory, as RGB; transparency is dropped.

    Raises ConfigError naming the file when it is no image, damaged, over 25 million pixels, or of more than 8 bits per colour.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ConfigError(
                    f"{path}: {width} x {height} pixels, at most {MAX_PIXELS} are read: make it smaller, or take it out"
                )
            if image.mode not in IMAGE_MODES:
                raise ConfigError(f"{path}: has pixels of kind {image.mode}: save it with 8 bits per colour")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: cannot be read as an image ({error}): replace it, or take it out") from error
