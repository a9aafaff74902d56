"""Settings of the published models at their real sizes, without weights, and a fixture of their pipeline folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from transformers import CLIPTextConfig, Gemma2Config

from sculpt_dist.backbones.parts.tiny import word_tokenizer
from sculpt_dist.backbones.sana import _word_tokenizer

DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
KL = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
)
OPENCLIP_BIG_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
# The published settings that sizes depend on.
MODELS: dict[str, dict[str, Any]] = {
    "sd15": {
        "model_index": {"_class_name": "StableDiffusionPipeline"},
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": [DOWN, DOWN, DOWN, "DownBlock2D"],
            "up_block_types": ["UpBlock2D", UP, UP, UP],
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        "vae": KL | {"scaling_factor": 0.18215},
        "text_encoder": CLIP_L,
        "scheduler": diffusers.PNDMScheduler(skip_prk_steps=True, **BETAS),
    },
    "sdxl": {
        "model_index": {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", DOWN, DOWN],
            "up_block_types": [UP, UP, "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": KL | {"scaling_factor": 0.13025, "force_upcast": True},
        "text_encoder": CLIP_L,
        "text_encoder_2": OPENCLIP_BIG_G,
        "scheduler": diffusers.EulerDiscreteScheduler(**BETAS),
    },
    "sana": {
        "model_index": {"_class_name": "SanaPipeline"},
        "transformer": {
            "_class_name": "SanaTransformer2DModel",
            "in_channels": 32,
            "out_channels": 32,
            "num_attention_heads": 70,
            "attention_head_dim": 32,
            "num_layers": 20,
            "num_cross_attention_heads": 20,
            "cross_attention_head_dim": 112,
            "cross_attention_dim": 2240,
            "caption_channels": 2304,
            "mlp_ratio": 2.5,
            "sample_size": 32,
            "patch_size": 1,
        },
        "vae": {
            "_class_name": "AutoencoderDC",
            "latent_channels": 32,
            "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
            "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
            "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
            "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
            "scaling_factor": 0.41407,
        },
        "text_encoder": Gemma2Config(),  # the defaults are those of the 2b model
        "scheduler": diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Pipeline folders of the real sizes, settings only; the tokenizers have the real classes, but know few words."""
    root = tmp_path_factory.mktemp("models")
    for arch, parts in MODELS.items():
        folder = root / arch
        named = [*parts, *(name.replace("text_encoder", "tokenizer") for name in parts)]
        for name, settings in parts.items():
            if not isinstance(settings, dict):
                settings.save_pretrained(folder / name)
                continue
            file = folder / name / "config.json" if name != "model_index" else folder / "model_index.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            components = {part: ["library", "Class"] for part in named} if name == "model_index" else {}
            file.write_text(json.dumps(components | settings))
        for name in [name.replace("text_encoder", "tokenizer") for name in parts if name.startswith("text_encoder")]:
            tokenizer = _word_tokenizer(["photo"]) if arch == "sana" else word_tokenizer(["photo"], max_length=77)
            if arch == "sana":
                tokenizer.model_max_length = int(1e30)  # as in Gemma's own
            tokenizer.save_pretrained(folder / name)
    return root
