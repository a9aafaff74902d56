"""Stable Diffusion 1.x and 2.x: UNet2DConditionModel, one CLIP text encoder, AutoencoderKL; eps- or v-prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sculpt_dist.backbones.base import Backbone as Base
from sculpt_dist.backbones.io.folders import component_config, load_tokenizer
from sculpt_dist.backbones.parts.conditions import UNET
from sculpt_dist.backbones.parts.options import Tiny, unet_blocks
from sculpt_dist.backbones.parts.schedules import DiscreteSchedule
from sculpt_dist.backbones.parts.stable import kl_autoencode, kl_decode, kl_encode
from sculpt_dist.backbones.parts.text import Tokens, padded_tokens
from sculpt_dist.core.types import TextCond


class Backbone(Base):
    """The Stable Diffusion 1.x/2.x pipeline. Shapes: latents [B, 4, h/8, w/8] at full size, tokens [B, 77, D]."""

    net_name, net_class = "unet", "diffusers.UNet2DConditionModel"
    conditions = UNET
    pipeline_class = "StableDiffusionPipeline"
    parts = {"vae": "diffusers.AutoencoderKL", "text_encoder": "transformers.CLIPTextModel"}
    schedule_class = DiscreteSchedule
    forced_settings = {"clip_sample": False, "steps_offset": 1}
    public_settings = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    tiny = {
        "small": Tiny(32, unet_blocks(56, 80), {"block_out_channels": (16, 32, 32)}, vae_steps=900, steps=1800),
        "large": Tiny(
            64,
            unet_blocks(96, 160, attention=(True, True), groups=16),
            {"block_out_channels": (24, 48, 96, 96)},
            vae_steps=4000,
            vae_batch=16,
            vae_rate=2e-3,
            steps=9600,
            latent_channels=8,
            text_width=128,
            batch=48,
            average=0.999,
            prediction="v_prediction",
            vae_autocast=True,
        ),
    }

    def vae_levels(self) -> int:
        return len(component_config(self.folder, "vae")["block_out_channels"])

    def tokenized(self, prompts: Sequence[str], negative: bool) -> Sequence[Tokens]:
        tokenizer = load_tokenizer(self.folder, "tokenizer")
        return [padded_tokens(tokenizer, prompts, tokenizer.model_max_length, self.options.cut_prompts)]

    def encode_tokens(self, tokens: Sequence[Tokens]) -> TextCond:
        given, encoder = tokens[0].to(self.device), self.part("text_encoder")
        mask = given.mask if getattr(encoder.config, "use_attention_mask", False) else None
        return TextCond(encoder(given.ids, attention_mask=mask)[0])  # [B, L, D]

    def encode(self, pixels: Tensor) -> Tensor:
        return kl_encode(self.vae, pixels)

    def decode_pixels(self, latents: Tensor) -> Tensor:
        return kl_decode(self.vae, latents)

    def autoencode(self, pixels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return kl_autoencode(self.vae, pixels, rng)

    def denoise(self, net: nn.Module, noisy: Tensor, time: Tensor, cond: TextCond) -> Tensor:
        dtype = next(net.parameters()).dtype
        return net(noisy.to(dtype), time, encoder_hidden_states=cond.tokens.to(dtype), return_dict=False)[0].float()

    @classmethod
    def write_untrained(cls, folder: Path, words: Sequence[str], seed: int, size: Tiny) -> None:
        from diffusers import StableDiffusionPipeline

        from sculpt_dist.backbones.parts import tiny

        tokenizer = tiny.word_tokenizer(words)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vae = tiny.tiny_autoencoder(size)
            text_encoder = tiny.clip_text_encoder(tokenizer, width=size.text_width, layers=size.text_layers)
            unet = tiny.tiny_unet(size, size.text_width)
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=tiny.tiny_scheduler(size.prediction),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
