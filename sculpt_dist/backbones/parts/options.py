"""What a user may say of a pipeline, and how a tiny one is pretrained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Options:
    """What a user may say of a pipeline beyond its folder; sizes in pixels, (height, width) or (top, left)."""

    image_size: int | None = None  # h = w; None = what the net was made for
    original_size: tuple[int, int] | None = None  # SDXL's size conditions; None = the image size, or an own image's
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    cut_prompts: bool = False  # cut a prompt that is too long for the text encoder, instead of refusing it


@dataclass(frozen=True)
class Pretraining:
    """How a tiny model of a kind is pretrained. Steps rather than seconds, so that the weights do not depend on the machine."""

    vae_steps: int = 150  # per CPU minute
    denoiser_steps: int = 300  # per CPU minute
    lr: float = 1.5e-3
    # How much more often a member is captioned by its superclass; 1 where not named. Guidance pushes a superclass's samples away from
    # what the average drawing looks like: with evenly captioned members some were hardly drawn.
    superclass_lean: Mapping[str, float] = field(default_factory=lambda: {"cat": 1.4, "tree": 1.15, "rocket": 1.3})
