"""The options of a pipeline, and the size of a tiny one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Options:
    """What a user may set beside a pipeline's folder; sizes in pixels, (height, width) or (top, left)."""

    image_size: int | None = None  # h = w; None = what the net was made for
    original_size: tuple[int, int] | None = None  # SDXL's size conditions; None = the image size, or an own image's
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    cut_prompts: bool = False  # cut a prompt that is too long for the text encoder, instead of refusing it
    text_batch: int = 16  # prompts that the text encoders take at once
    text_dtype: torch.dtype | None = None  # of the text encoders; None = that of the pipeline
    vae_dtype: torch.dtype | None = None  # of the autoencoder; None = that of the pipeline, or fp32 where it needs it


@dataclass(frozen=True)
class Tiny:
    """The size of a pipeline that a CPU can train, and for how long. Sizes of the net and the VAE: diffusers' names."""

    image_size: int  # pixels, h = w
    net: Mapping[str, Any]
    vae: Mapping[str, Any]
    vae_steps: int
    steps: int  # of the denoiser and the text encoders
    latent_channels: int = 4
    text_width: int = 64
    text_layers: int = 2
    vae_batch: int = 32
    vae_rate: float = 3e-3  # peak learning rate
    batch: int = 32
    rate: float = 1.5e-3
    average: float = 0.995  # decay of the moving average of the denoiser's weights
    prediction: str = "epsilon"  # or v_prediction, which learns much faster where there are many pictures
    vae_autocast: bool = False  # train the VAE in bf16: twice as fast at 64 pixels, on a CPU with AMX


def unet_blocks(*channels: int, attention: Sequence[bool] = (False, True), groups: int = 8) -> dict[str, Any]:
    """The settings of a UNet with a level for each number of channels, and with attention at some of them."""
    down = tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention)
    up = tuple(name.replace("Down", "Up") for name in reversed(down))
    return {
        "block_out_channels": channels,
        "down_block_types": down,
        "up_block_types": up,
        "norm_num_groups": groups,
    }
