"""Image size and latent shape of a pipeline, from the settings of its denoiser and the depth of its autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sculpt_dist.core.errors import ConfigError, ModelError

MOST_PIXELS = 16_384  # along a side; four times those of any published model
Sizes = tuple[int, tuple[int, int, int]]  # image size in pixels, latent shape (C, H, W)


def square_sizes(
    net_settings: Mapping[str, Any], vae_levels: Callable[[], int], image_size: int | None, where: str
) -> Sizes:
    """Square images, by default of the size that the net was made for; a level of the autoencoder halves a side.

    Raises ConfigError for a size that the net cannot have, ModelError (which names `where`) for broken settings.
    """
    try:
        pixels = 2 ** (vae_levels() - 1)  # per latent, along a side
        channels, default = int(net_settings["in_channels"]), int(net_settings["sample_size"]) * pixels
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{where} has a missing or invalid size ({error})") from error
    size = default if image_size is None else image_size
    needed = pixels * net_settings.get("patch_size", 1)
    if size % needed or size < needed:
        raise ConfigError(f"model.image_size={size}: this model needs a multiple of {needed}")
    if size > MOST_PIXELS:
        cause = f"model.image_size={size}" if image_size else f"{where} asks for images of {size} pixels"
        raise ConfigError(f"{cause}: must be at most {MOST_PIXELS:,}")
    return size, (channels, size // pixels, size // pixels)
