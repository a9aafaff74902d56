"""Builds the canvas models from nothing on a CPU: draws the world, trains its classifier and a tiny pipeline."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from sculpt_dist.canvas.classifier import save_classifier, to_float, train_classifier
from sculpt_dist.canvas.draw import draw_dataset
from sculpt_dist.canvas.measure import console, measure_drawings, measure_samples, print_report
from sculpt_dist.canvas.world import NUM_FORMS, OBJECTS, STYLES, SUPERCLASS_OF, WORDS, prompt
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.plugins import plugin

if TYPE_CHECKING:
    from sculpt_dist.backbones.base import Backbone
    from sculpt_dist.core.types import TextCond

PER_PAIR = 150  # drawings of each object in each style
BATCH = 32
EMA_DECAY = 0.995


@dataclass(frozen=True)
class CaptionMix:
    """How often a training caption takes each form. The draws are independent; `empty` overrides all others."""

    lean: Mapping[str, float]  # object -> factor on `superclass` for that object; 1 for objects not listed
    superclass: float = 0.15  # "animal" instead of "cat"
    no_object: float = 0.05
    no_style: float = 0.10
    empty: float = 0.08  # for classifier-free guidance
    other_forms: float = 0.25  # forms 1 and 2, evenly

    def caption(self, name: str, style: str, rng: np.random.Generator) -> str:
        """A caption for a drawing of `name` in `style`."""
        chance = rng.random()
        caption_name: str | None
        if chance < self.no_object:
            caption_name = None
        else:
            superclass = self.superclass * self.lean.get(name, 1.0)
            caption_name = SUPERCLASS_OF[name] if chance < self.no_object + superclass else name
        caption_style = None if rng.random() < self.no_style else style
        form = int(rng.integers(1, NUM_FORMS)) if rng.random() < self.other_forms else 0
        return "" if rng.random() < self.empty else prompt(caption_name, caption_style, form)


def build_canvas(arch: str, folder: Path, seed: int = 0, cpu_minutes: float = 6.0) -> dict[str, float]:
    """Write the pipeline `folder/<arch>` (fp16) and `folder/classifier.safetensors`; returns what was measured.

    `cpu_minutes` sets the number of steps, roughly that long on one core; equal seeds and minutes train equal steps on
    every machine. Accuracies are 0 to 1, measured on the fp16 folder after reloading it. Raises ConfigError for an
    `arch` without a tiny pipeline, and for `cpu_minutes` not above 0.
    """
    kind = plugin("sculpt_dist.backbones", arch, "arch").Backbone
    if cpu_minutes <= 0:
        raise ConfigError(
            f"cpu_minutes={cpu_minutes}: must be above 0; 6 minutes train a model that draws every object"
        )
    from sculpt_dist.backbones.io.folders import quiet_libraries

    rng = torch.Generator().manual_seed(seed)
    pixels, objects, styles = draw_dataset(PER_PAIR, seed)
    classifier = train_classifier(pixels, objects, styles, seed)
    save_classifier(classifier, folder / "classifier.safetensors")
    object_accuracy, style_accuracy = measure_drawings(classifier, *draw_dataset(10, seed + 1))  # held out
    report = {"drawings/object": object_accuracy, "drawings/style": style_accuracy}

    quiet_libraries()
    kind.write_untrained(folder / arch, WORDS, seed)
    backbone = kind(folder / arch, torch.float32, torch.device("cpu"))
    images = to_float(pixels)  # [N, 3, 32, 32]
    report["vae/psnr"] = train_vae(backbone, images, math.ceil(kind.tiny.vae_steps * cpu_minutes), rng)
    latents = encode_all(backbone, images)  # [N, 4, 8, 8]
    train_denoiser(backbone, latents, objects, styles, math.ceil(kind.tiny.denoiser_steps * cpu_minutes), rng)
    _save_fp16(backbone, folder / arch)

    report |= measure_samples(kind(folder / arch, torch.float32, torch.device("cpu")), classifier)
    print_report(report)
    return report


def train_vae(backbone: Backbone, pixels: Tensor, num_steps: int, rng: torch.Generator) -> float:
    """Train the VAE on float pixels [N, 3, 32, 32], set its scaling factor, and return its reconstruction PSNR in
    dB.
    """
    peak, vae = 3e-3, backbone.vae.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(vae.parameters(), peak, betas=(0.9, 0.98), weight_decay=1e-3)
    for step in track(range(num_steps), description="vae", console=console):
        optimizer.param_groups[0]["lr"] = peak * _warmup_cosine(step, num_steps, 50)
        images = pixels[torch.randint(len(pixels), (BATCH,), generator=rng)]  # [B, 3, 32, 32]
        decoded, penalty = backbone.autoencode(images, rng)
        distortion = nn.functional.mse_loss(decoded, images) + 0.3 * nn.functional.l1_loss(decoded, images)
        _descend(distortion + penalty, list(vae.parameters()), optimizer)
    vae.requires_grad_(False).eval()
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=float(1 / encode_all(backbone, pixels).std()))
    with torch.no_grad():
        decoded = backbone.decode_pixels(encode_all(backbone, pixels[::20])).clamp(-1, 1)
    return float(10 * torch.log10(4 / nn.functional.mse_loss(decoded, pixels[::20])))


def encode_all(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Float pixels [N, 3, 32, 32] -> mean latents [N, 4, 8, 8], scaled as the denoiser expects."""
    return torch.cat([backbone.encode(part) for part in pixels.split(250)])


def train_denoiser(
    backbone: Backbone, latents: Tensor, objects: np.ndarray, styles: np.ndarray, num_steps: int, rng: torch.Generator
) -> None:
    """Train the denoiser and the text encoders together on latents [N, 4, 8, 8]; they end as their moving average."""
    tiny, caption_rng = backbone.tiny, np.random.default_rng(rng.initial_seed())
    mix = CaptionMix(tiny.superclass_lean)
    trained = [name for name in (backbone.net_name, *backbone.parts) if name != "vae"]
    parts = [backbone.part(name).requires_grad_(True).train() for name in trained]
    weights = [weight for part in parts for weight in part.parameters()]
    averages = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, tiny.lr, betas=(0.9, 0.98), weight_decay=1e-2, fused=True)
    for step in track(range(num_steps), description="denoiser", console=console):
        optimizer.param_groups[0]["lr"] = tiny.lr * _warmup_cosine(step, num_steps, 100)
        chosen = torch.randint(len(latents), (BATCH,), generator=rng)
        captions = [mix.caption(OBJECTS[objects[i]], STYLES[styles[i]], caption_rng) for i in chosen.tolist()]
        _descend(_denoising_loss(backbone, latents[chosen], captions, rng), weights, optimizer)
        decay = min(EMA_DECAY, (step + 2) / (step + 11))
        torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1 - decay)
    with torch.no_grad():
        torch._foreach_copy_(weights, averages)
    for part in parts:
        part.requires_grad_(False).eval()


def _denoising_loss(backbone: Backbone, clean: Tensor, captions: Sequence[str], rng: torch.Generator) -> Tensor:
    """The weighted prediction error on clean latents [B, 4, 8, 8], a scalar."""
    time = backbone.sample_time(torch.rand(len(clean), generator=rng))  # [B]
    noise = torch.randn(clean.shape, generator=rng)
    noisy = backbone.corrupt(clean, noise, time)  # [B, 4, 8, 8]
    predicted = backbone.denoise(backbone.net, noisy, time, _encode_captions(backbone, captions))
    errors = (predicted - backbone.goal(clean, noise, time)).square().mean((1, 2, 3))  # [B]
    return (errors * backbone.schedule.stress(time)).mean()


def _encode_captions(backbone: Backbone, captions: Sequence[str]) -> TextCond:
    """[B, ...], with gradient; each distinct caption passes through the text encoders once."""
    distinct = sorted(set(captions))
    places = torch.tensor([distinct.index(caption) for caption in captions])
    return backbone.encode_prompts(distinct, negative=False)[places]


def _descend(loss: Tensor, weights: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()


def _warmup_cosine(step: int, num_steps: int, num_warmup: int) -> float:
    return min(1, (step + 1) / num_warmup) * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))


def _save_fp16(backbone: Backbone, folder: Path) -> None:
    """Overwrite the components of the pipeline folder with the trained ones, in fp16."""
    for name in (backbone.net_name, *backbone.parts):
        backbone.part(name).to(torch.float16).save_pretrained(folder / name)
        file = folder / name / "config.json"
        settings = json.loads(file.read_text())
        settings.pop("_name_or_path", None)  # a path on this machine
        file.write_text(json.dumps(settings, indent=2) + "\n")
