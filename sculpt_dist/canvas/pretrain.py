"""Builds the canvas from nothing on a CPU: draws the world, trains its classifier and a tiny pipeline, and measures what it samples."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from sculpt_dist.canvas.classifier import CanvasClassifier, save_classifier, to_float, train_classifier
from sculpt_dist.canvas.draw import draw_dataset
from sculpt_dist.canvas.world import NUM_FORMS, OBJECTS, STYLES, SUPERCLASS_OF, SUPERCLASSES, WORDS, prompt
from sculpt_dist.core.errors import ConfigError

if TYPE_CHECKING:
    from sculpt_dist.backbones.base import Backbone
    from sculpt_dist.core.types import TextCond

PER_PAIR = 150  # drawings of each object in each style
BATCH = 32
EMA_DECAY = 0.995

console = Console()


@dataclass(frozen=True)
class CaptionMix:
    """How often a training caption takes each form; the probabilities are independent draws, `empty` overriding the rest."""

    lean: Mapping[str, float]  # of members to be captioned by their superclass; 1 where not named
    superclass: float = 0.15  # "animal" in place of "cat", times the lean
    no_object: float = 0.05
    no_style: float = 0.10
    empty: float = 0.08  # for classifier-free guidance
    other_forms: float = 0.25  # forms 1 and 2, evenly

    def caption(self, name: str, style: str, rng: np.random.Generator) -> str:
        """A caption for a drawing of `name` in `style`."""
        chance = rng.random()
        if chance < self.no_object:
            shown = None
        else:
            superclass = self.superclass * self.lean.get(name, 1.0)
            shown = SUPERCLASS_OF[name] if chance < self.no_object + superclass else name
        shown_style = None if rng.random() < self.no_style else style
        form = int(rng.integers(1, NUM_FORMS)) if rng.random() < self.other_forms else 0
        return "" if rng.random() < self.empty else prompt(shown, shown_style, form)


def build_canvas(arch: str, folder: Path, seed: int = 0, cpu_minutes: float = 6.0) -> dict[str, float]:
    """Write the pipeline `folder/<arch>` (fp16) and `folder/classifier.safetensors`, and return how well its samples are recognised.

    `cpu_minutes` sets the number of steps, about that long on one core; the same seed and minutes take the same steps everywhere.
    Accuracies are 0 to 1, of the reloaded fp16 folder. Raises ConfigError for an `arch` that has no tiny pipeline, or for
    `cpu_minutes` not above 0.
    """
    from sculpt_dist.backbones.io.folders import quiet_libraries  # diffusers takes seconds to import
    from sculpt_dist.core.plugins import plugin

    kind = plugin("sculpt_dist.backbones", arch, "arch").Backbone
    if cpu_minutes <= 0:
        raise ConfigError(
            f"cpu_minutes={cpu_minutes}: nothing can be trained in that: use 6 for a model that draws every object"
        )
    rng = torch.Generator().manual_seed(seed)
    drawn = draw_dataset(PER_PAIR, seed)
    classifier = train_classifier(*drawn, seed)
    save_classifier(classifier, folder / "classifier.safetensors")
    object_accuracy, style_accuracy = recognised(classifier, *draw_dataset(10, seed + 1))  # held out
    report = {"drawings/object": object_accuracy, "drawings/style": style_accuracy}

    quiet_libraries()
    kind.write_untrained(folder / arch, WORDS, seed)
    backbone = kind(folder / arch, torch.float32, torch.device("cpu"))
    pixels = to_float(drawn[0])  # [N, 3, 32, 32]
    report["vae/psnr"] = train_vae(backbone, pixels, math.ceil(kind.tiny.vae_steps * cpu_minutes), rng)
    latents = encode_all(backbone, pixels)  # [N, 4, 8, 8]
    train_denoiser(backbone, latents, drawn[1], drawn[2], math.ceil(kind.tiny.denoiser_steps * cpu_minutes), rng)
    for name in (kind.net_name, *kind.parts):
        backbone.part(name).to(torch.float16).save_pretrained(folder / arch / name)
        settings = folder / arch / name / "config.json"
        kept = {
            key: value for key, value in json.loads(settings.read_text()).items() if key != "_name_or_path"
        }  # a path of this machine
        settings.write_text(json.dumps(kept, indent=2) + "\n")

    report.update(measure_samples(kind(folder / arch, torch.float32, torch.device("cpu")), classifier))
    _print_report(report)
    return report


# Training


def train_vae(backbone: Backbone, pixels: Tensor, num_steps: int, rng: torch.Generator) -> float:
    """Train on float pixels [N, 3, 32, 32], set its scaling factor, and return the PSNR of its reconstructions in dB."""
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
    parts = [
        backbone.part(name).requires_grad_(True).train()
        for name in (backbone.net_name, *backbone.parts)
        if name != "vae"
    ]
    weights = [weight for part in parts for weight in part.parameters()]
    averages = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, tiny.lr, betas=(0.9, 0.98), weight_decay=1e-2, fused=True)
    for step in track(range(num_steps), description="denoiser", console=console):
        optimizer.param_groups[0]["lr"] = tiny.lr * _warmup_cosine(step, num_steps, 100)
        chosen = torch.randint(len(latents), (BATCH,), generator=rng)
        captions = [mix.caption(OBJECTS[objects[i]], STYLES[styles[i]], caption_rng) for i in chosen.tolist()]
        time = backbone.sample_time(torch.rand(BATCH, generator=rng))
        clean = latents[chosen]  # [B, 4, 8, 8]
        noise = torch.randn(clean.shape, generator=rng)
        noisy = backbone.corrupt(clean, noise, time)
        predicted = backbone.denoise(backbone.net, noisy, time, _encoded(backbone, captions))
        errors = (predicted - backbone.goal(clean, noise, time)).square().mean((1, 2, 3)) * backbone.schedule.stress(
            time
        )  # [B]
        _descend(errors.mean(), weights, optimizer)
        decay = min(EMA_DECAY, (step + 2) / (step + 11))
        torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1 - decay)
    with torch.no_grad():
        torch._foreach_copy_(weights, averages)
    for part in parts:
        part.requires_grad_(False).eval()


def _encoded(backbone: Backbone, captions: Sequence[str]) -> TextCond:
    """[B, ...], with gradient; each distinct caption passes the text encoders once."""
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


# Measuring


def sample_images(
    backbone: Backbone, prompts: Sequence[str], steps: int = 8, guidance: float = 3.0, seed: int = 0
) -> Tensor:
    """Float pixels [N, 3, 32, 32] in [-1, 1]."""
    rng = torch.Generator().manual_seed(seed)
    parts = []
    for first in range(0, len(prompts), 60):
        chunk = list(prompts[first : first + 60])
        noise = torch.randn(len(chunk), *backbone.latent_shape, generator=rng)
        cond, negative = backbone.embed(chunk), backbone.embed([""] * len(chunk), negative=True)
        parts.append(
            backbone.decode(backbone.sample(backbone.denoiser(backbone.net), noise, cond, negative, steps, guidance))
        )
    return to_float(torch.cat(parts).permute(0, 2, 3, 1).numpy())


def recognised(
    classifier: CanvasClassifier, pixels: np.ndarray, objects: np.ndarray, styles: np.ndarray
) -> tuple[float, float]:
    """Share of drawings whose object, and whose style, the classifier names rightly."""
    with torch.no_grad():
        object_logits, style_logits = classifier(to_float(pixels))
    right_object = object_logits.argmax(1) == torch.as_tensor(objects)
    right_style = style_logits.argmax(1) == torch.as_tensor(styles)
    return right_object.float().mean().item(), right_style.float().mean().item()


def measure_samples(
    backbone: Backbone, classifier: CanvasClassifier, per_pair: int = 8, seed: int = 1000
) -> dict[str, float]:
    """Accuracy of sampled images by caption form, by object, and how evenly a superclass prompt draws its members.

    Keys: `object/form<k>`, `style/form<k>`; `<object>` (form 0); `<superclass>/<member>`, the share of that member.
    """
    pairs = [(i, j) for i in range(len(OBJECTS)) for j in range(len(STYLES)) for _ in range(per_pair)]
    objects, styles = (torch.tensor(column) for column in zip(*pairs))
    report: dict[str, float] = {}
    for form in track(range(NUM_FORMS), description="sampling", console=console):
        images = sample_images(backbone, [prompt(OBJECTS[i], STYLES[j], form) for i, j in pairs], seed=seed + form)
        with torch.no_grad():
            object_logits, style_logits = classifier(images)
        right = object_logits.argmax(1) == objects  # [N]
        report[f"object/form{form}"] = right.float().mean().item()
        report[f"style/form{form}"] = (style_logits.argmax(1) == styles).float().mean().item()
        if form == 0:
            report.update({name: right[objects == i].float().mean().item() for i, name in enumerate(OBJECTS)})
    for superclass, members in SUPERCLASSES.items():
        images = sample_images(
            backbone, [prompt(superclass, style) for style in STYLES for _ in range(3 * per_pair)], seed=seed
        )
        with torch.no_grad():
            drawn = classifier(images)[0].argmax(1)
        report.update(
            {f"{superclass}/{name}": (drawn == OBJECTS.index(name)).float().mean().item() for name in members}
        )
    return report


def _print_report(report: dict[str, float]) -> None:
    table = Table("measured", "value")
    for name, value in report.items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)
