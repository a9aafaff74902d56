"""Stable Diffusion 1.x and 2.x: UNet2DConditionModel, one CLIP text encoder, AutoencoderKL; eps- or v-prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from sculpt_dist.backbones.base import Backbone as Base
from sculpt_dist.backbones.folders import load_component, load_scheduler, pipeline_index
from sculpt_dist.errors import ModelError
from sculpt_dist.maths.diffusion import ddpm_corrupt, ddpm_velocity
from sculpt_dist.types import TextCond


class Backbone(Base):
    """The Stable Diffusion 1.x/2.x pipeline. Shapes: latents [B, 4, h/8, w/8] at full size, tokens [B, 77, D]."""

    net_name = "unet"
    pipeline_class = "StableDiffusionPipeline"

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device) -> Backbone:
        pipeline_index(folder, cls.pipeline_class)
        self = cls()
        self.folder, self.device, self.dtype = folder, device, dtype
        self.net = load_component(UNet2DConditionModel, folder, "unet", dtype).to(device)
        self.vae = load_component(AutoencoderKL, folder, "vae", dtype).to(device)
        self.text_encoder = load_component(CLIPTextModel, folder, "text_encoder", dtype).to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self.scheduler = load_scheduler(folder)
        self.prediction = self.scheduler.config.get("prediction_type", "none")
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ModelError(f"{folder}/scheduler: prediction_type {self.prediction!r}; this backbone knows epsilon and v_prediction")
        self.alpha_bar = self.scheduler.alphas_cumprod.to(device)  # [T]
        size = self.net.config.sample_size
        self.latent_shape = (self.net.config.in_channels, size, size)
        self.image_size = size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self

    def encode_prompts(self, prompts: Sequence[str]) -> TextCond:
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        mask = tokens.attention_mask.to(self.device) if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        return TextCond(self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0])  # [B, L, D]

    def encode(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            mean = self.vae.encode(pixels.to(self.device, self.dtype)).latent_dist.mean
        return mean * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        with torch.no_grad():
            pixels = self.vae.decode(latents.to(self.dtype) / self.vae.config.scaling_factor).sample  # [B, 3, h, w]
        return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    def sample_time(self, uniform: Tensor, window: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        low, high = window
        steps = len(self.alpha_bar)
        return ((low + (high - low) * uniform) * steps).long().clamp(0, steps - 1).to(self.device)

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return ddpm_corrupt(clean, noise, self.alpha_bar[time])

    def goal(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return noise if self.prediction == "epsilon" else ddpm_velocity(clean, noise, self.alpha_bar[time])

    def denoise(self, net: nn.Module, noisy: Tensor, time: Tensor, cond: TextCond) -> Tensor:
        dtype = next(net.parameters()).dtype
        return net(noisy.to(dtype), time, encoder_hidden_states=cond.tokens.to(dtype), return_dict=False)[0].float()

    def sampler(self, steps: int) -> Any:
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler
