"""What the settings of a net and an autoencoder ask for: conditions that are not passed, scales that cannot be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sculpt_dist.core.errors import ModelError

Passed = Mapping[
    str, tuple[Any, ...]
]  # settings that decide what a net takes -> the values that a kind of model serves

UNET: dict[
    str, tuple[Any, ...]
] = {  # of diffusers' UNet2DConditionModel; None also stands for a setting that is off or missing
    "addition_embed_type": (None, "text"),
    "attention_type": (None, "default"),
    "class_embed_type": (None,),
    "dual_cross_attention": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "num_class_embeds": (None,),
    "time_cond_proj_dim": (None,),
}
MEANINGS = {
    "addition_embed_type": "other size and text conditions than model.arch gives it",
    "attention_type": "boxes, as GLIGEN does",
    "class_embed_type": "a class or a noise level, as upscalers and unCLIP do",
    "dual_cross_attention": "an image beside the text",
    "encoder_hid_dim_type": "an image beside the text",
    "guidance_embeds": "the guidance, which is built in, as in SANA-Sprint",
    "num_class_embeds": "a class or a noise level, as upscalers and unCLIP do",
    "time_cond_proj_dim": "the guidance, which is built in, as in LCM",
}


def check_conditions(settings: Mapping[str, Any], passed: Passed, file: Path) -> None:
    """Raises ModelError, which names `file`, for a net that takes a condition which the kind of model does not pass."""
    for key, values in passed.items():
        value = settings.get(key) or None
        if value not in values:
            raise ModelError(
                f"{file}: {key}={value}: this net takes {MEANINGS[key]}; give the text-to-image model that it was made "
                "from, or set model.arch to its kind"
            )


def check_channels(channels: int, latent_channels: Any, file: Path) -> None:
    """Raises ModelError, which names `file`, for a net that takes more than the latent, as nets for inpainting do."""
    if isinstance(latent_channels, int) and channels > latent_channels:
        kinds = {2 * latent_channels + 1: "an inpainting model", 2 * latent_channels: "a model that edits images"}
        kind = kinds.get(channels, "no text-to-image model")
        raise ModelError(
            f"{file}: in_channels={channels}, but the vae's latents have {latent_channels}: this is {kind}; give the "
            "text-to-image model that it was made from"
        )


def check_scaling(settings: Mapping[str, Any], file: Path) -> None:
    """Raises ModelError, which names `file`, for an autoencoder whose latents cannot be scaled as its settings say."""
    for key in ("scaling_factor", "latents_std", "latents_mean"):
        value = settings.get(key)
        values: list[Any] = value if isinstance(value, list) and key != "scaling_factor" else [value]
        numbers = bool(values) and all(type(number) in (int, float) and math.isfinite(number) for number in values)
        if value is not None and not (numbers and (key == "latents_mean" or min(values) > 0)):
            wanted = "finite numbers" if key == "latents_mean" else "finite and above 0"
            raise ModelError(f"{file}: {key}={str(value)[:200]}: must be {wanted}; fetch it again")
