"""The options of a pipeline, and how a tiny one is pretrained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
class Pretraining:
    """How a tiny model is pretrained: by steps, not seconds, so that its weights do not depend on the machine."""

    vae_steps: int = 150  # per CPU minute
    denoiser_steps: int = 300  # per CPU minute
    lr: float = 1.5e-3
    # How much more often a caption names the superclass of a member; 1 where not listed. Guidance pushes a superclass's
    # samples away from the average drawing: with even captions, some members were hardly ever drawn.
    superclass_lean: Mapping[str, float] = field(default_factory=lambda: {"cat": 1.4, "tree": 1.15, "rocket": 1.3})
