"""SDXL: UNet2DConditionModel with size conditions, two CLIP text encoders, pooled text, AutoencoderKL.

The prediction is eps or v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculpt_dist.backbones.base import Backbone as Base
from sculpt_dist.backbones.io.folders import component_config, load_tokenizer, pipeline_index
from sculpt_dist.backbones.parts.conditions import UNET
from sculpt_dist.backbones.parts.options import Tiny, unet_blocks
from sculpt_dist.backbones.parts.schedules import DiscreteSchedule
from sculpt_dist.backbones.parts.stable import kl_autoencode, kl_decode, kl_encode
from sculpt_dist.backbones.parts.text import Tokens, padded_tokens
from sculpt_dist.core.types import TextCond


class Backbone(Base):
    """The SDXL base pipeline (Podell et al., arXiv 2307.01952).

    At full size latents [B, 4, 128, 128], tokens [B, 77, 2048], pooled [B, 1280].
    """

    net_name, net_class = "unet", "diffusers.UNet2DConditionModel"
    conditions = {**UNET, "addition_embed_type": ("text_time",)}
    pipeline_class = "StableDiffusionXLPipeline"
    parts = {
        "vae": "diffusers.AutoencoderKL",
        "text_encoder": "transformers.CLIPTextModel",
        "text_encoder_2": "transformers.CLIPTextModelWithProjection",
    }
    text_encoders, tokenizers = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
    schedule_class = DiscreteSchedule
    public_settings = "stabilityai/stable-diffusion-xl-base-1.0"
    tiny = {
        "small": Tiny(32, unet_blocks(64, 96), {"block_out_channels": (16, 32, 32)}, vae_steps=900, steps=1800),
    }

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.zero_negative = pipeline_index(self.folder, self.pipeline_class).get("force_zeros_for_empty_prompt", True)
        whole, options = (self.image_size, self.image_size), self.options
        self.size_ids: tuple[int, ...] = (
            *(options.original_size or whole),
            *(options.crop or (0, 0)),
            *(options.target_size or whole),
        )

    def vae_levels(self) -> int:
        return len(component_config(self.folder, "vae")["block_out_channels"])

    def tokenized(self, prompts: Sequence[str], negative: bool) -> Sequence[Tokens]:
        tokenizers = [load_tokenizer(self.folder, name) for name in self.tokenizers]
        return [
            padded_tokens(tokenizer, prompts, tokenizer.model_max_length, self.options.cut_prompts)
            for tokenizer in tokenizers
        ]

    def encode_tokens(self, tokens: Sequence[Tokens]) -> TextCond:
        """Both encoders' last but one hidden states side by side, and the second's projected end token."""
        hidden, pooled = [], torch.empty(0)
        for name, given in zip(self.text_encoders, tokens):
            encoded = self.part(name)(given.ids.to(self.device), output_hidden_states=True)
            hidden.append(encoded.hidden_states[-2])
            pooled = encoded[0]  # the second's stays: [B, P]
        return self.with_size_ids(TextCond(torch.cat(hidden, -1), pooled=pooled))  # [B, L, D1 + D2]

    def encode_prompts(self, prompts: Sequence[str], negative: bool) -> TextCond:
        """A pipeline without a negative prompt guides away from zeros, where its settings say so."""
        cond = super().encode_prompts(prompts, negative)
        if not (negative and self.zero_negative):
            return cond
        assert cond.pooled is not None
        kept = torch.tensor([bool(prompt) for prompt in prompts], device=self.device).to(cond.tokens)
        return replace(cond, tokens=cond.tokens * kept.view(-1, 1, 1), pooled=cond.pooled * kept.view(-1, 1))

    def size_ids_of(self, height: int, width: int) -> tuple[int, ...]:
        short, options = min(height, width), self.options
        crop = tuple((round(side * self.image_size / short) - self.image_size) // 2 for side in (height, width))
        return (*(options.original_size or (height, width)), *(options.crop or crop), *self.size_ids[4:])

    def encode(self, pixels: Tensor) -> Tensor:
        return kl_encode(self.vae, pixels)

    def decode_pixels(self, latents: Tensor) -> Tensor:
        return kl_decode(self.vae, latents)

    def autoencode(self, pixels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return kl_autoencode(self.vae, pixels, rng)

    def denoise(self, net: nn.Module, noisy: Tensor, time: Tensor, cond: TextCond) -> Tensor:
        assert cond.pooled is not None and cond.size_ids is not None, "SDXL's conditions have both"
        dtype = next(net.parameters()).dtype
        tokens = cond.tokens.to(dtype)
        added = {"text_embeds": cond.pooled.to(dtype), "time_ids": cond.size_ids}
        predicted = net(noisy.to(dtype), time, encoder_hidden_states=tokens, added_cond_kwargs=added, return_dict=False)
        return predicted[0].float()

    @classmethod
    def write_untrained(cls, folder: Path, words: Sequence[str], seed: int, size: Tiny) -> None:
        from diffusers import StableDiffusionXLPipeline
        from transformers import CLIPTextModelWithProjection

        from sculpt_dist.backbones.parts import tiny

        tokenizer, second_width, size_width = tiny.word_tokenizer(words), 96, 8
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vae = tiny.tiny_autoencoder(size)
            text_encoder = tiny.clip_text_encoder(tokenizer, width=size.text_width)
            text_encoder_2 = tiny.clip_text_encoder(tokenizer, CLIPTextModelWithProjection, second_width)
            unet = tiny.tiny_unet(
                size,
                size.text_width + second_width,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=size_width,
                projection_class_embeddings_input_dim=6 * size_width + second_width,
            )
        StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=unet,
            scheduler=tiny.tiny_scheduler(size.prediction),
            force_zeros_for_empty_prompt=False,  # the tiny model learns the empty prompt
            add_watermarker=False,
        ).save_pretrained(folder)
