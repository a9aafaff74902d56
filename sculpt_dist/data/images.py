"""Reading the user's image files: which types count, how large they may be, and the errors for bad files."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from sculpt_dist.core.errors import ConfigError

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 25_000_000  # PIL only warns, from 89 million on; a file of 12 kB can hold 100 million pixels
IMAGE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits per channel or less


def open_image(path: Path) -> Image.Image:
    """Read the whole image as RGB, without its transparency.

    Raises ConfigError with the file's name if it is not an image, is damaged, has over 25 million pixels, or has more
    than 8 bits per channel.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ConfigError(
                    f"{path}: has {width} x {height} pixels, over the limit of {MAX_PIXELS}: "
                    "make it smaller, or remove it"
                )
            if image.mode not in IMAGE_MODES:
                raise ConfigError(f"{path}: has the pixel format {image.mode}: save it with 8 bits per channel")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: cannot be read as an image ({error}): replace it, or remove it") from error
