"""Measures a world's models: what a classifier recognises in images, and in what a pipeline draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from sculpt_dist.worlds.base import NUM_FORMS, World
from sculpt_dist.worlds.classifier import WorldClassifier, to_float
from sculpt_dist.worlds.console import console

if TYPE_CHECKING:
    from sculpt_dist.backbones.base import Backbone

BATCH = 64  # images at a time


def measure_images(
    classifier: WorldClassifier, pixels: np.ndarray, objects: np.ndarray, styles: np.ndarray
) -> dict[str, float]:
    """Shares of images, uint8 [N, h, w, 3], whose `object` and whose `style` the classifier recognises."""
    seen = recognised(classifier, to_float(pixels))
    wanted = torch.as_tensor(objects), torch.as_tensor(styles)
    return {name: _share(found == right) for name, found, right in zip(("object", "style"), seen, wanted)}


@torch.no_grad()
def recognised(classifier: WorldClassifier, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Float pixels [N, 3, h, w] in [-1, 1] -> the objects and the styles seen in them, int64 [N] each."""
    logits = [classifier(part) for part in pixels.split(BATCH)]
    objects, styles = (torch.cat(parts).argmax(1) for parts in zip(*logits))
    return objects, styles


def measure_samples(
    world: World, backbone: Backbone, classifiers: Mapping[str, WorldClassifier], per_pair: int, seed: int = 1000
) -> dict[str, float]:
    """Accuracy of sampled images by caption form and by object, and how evenly superclass prompts draw their members.

    Keys, each behind the name of a classifier: `object/form<k>`, `style/form<k>`; `<object>` (form 0);
    `<superclass>/<member>`, the share of that member.
    """
    pairs = [(i, j) for i in range(len(world.objects)) for j in range(len(world.styles)) for _ in range(per_pair)]
    objects, styles = (torch.tensor(column) for column in zip(*pairs))
    report: dict[str, float] = {}
    for form in track(range(NUM_FORMS), description="sampling", console=console):
        prompts = [world.prompt(world.objects[i], world.styles[j], form) for i, j in pairs]
        images = sample_images(backbone, prompts, seed=seed + form)
        for judge, classifier in classifiers.items():
            seen_objects, seen_styles = recognised(classifier, images)
            report[f"{judge}/object/form{form}"] = _share(seen_objects == objects)
            report[f"{judge}/style/form{form}"] = _share(seen_styles == styles)
            for i, name in enumerate(world.objects if form == 0 else ()):
                report[f"{judge}/{name}"] = _share((seen_objects == i)[objects == i])
    for superclass, members in world.superclasses.items():
        prompts = [world.prompt(superclass, style) for style in world.styles for _ in range(3 * per_pair)]
        images = sample_images(backbone, prompts, seed=seed)
        for judge, classifier in classifiers.items():
            drawn, _ = recognised(classifier, images)
            for name in members:
                report[f"{judge}/{superclass}/{name}"] = _share(drawn == world.objects.index(name))
    return report


def wrong_pairs(world: World, backbone: Backbone, classifier: WorldClassifier, seeds: int = 4) -> list[str]:
    """Pairs OBJECT/STYLE of which fewer than half of the samples show both; a score that counts them measures the base.

    As `evaluate.without` takes them.
    """
    pairs = [(i, j) for i in range(len(world.objects)) for j in range(len(world.styles))]
    objects, styles = (torch.tensor(column) for column in zip(*pairs))
    prompts = [world.prompt(world.objects[i], world.styles[j]) for i, j in pairs]
    right = torch.zeros(len(pairs))
    for seed in track(range(seeds), description="pairs", console=console):
        seen = recognised(classifier, sample_images(backbone, prompts, steps=10, seed=2000 + seed))
        right += (seen[0] == objects) & (seen[1] == styles)
    return [f"{world.objects[i]}/{world.styles[j]}" for (i, j), count in zip(pairs, right) if 2 * count < seeds]


def sample_images(
    backbone: Backbone, prompts: Sequence[str], steps: int = 8, guidance: float = 3.0, seed: int = 0
) -> Tensor:
    """One image per prompt, float pixels [N, 3, h, w] in [-1, 1]."""
    rng = torch.Generator().manual_seed(seed)
    denoiser, parts = backbone.denoiser(backbone.net), []
    for first in range(0, len(prompts), BATCH):
        chunk = list(prompts[first : first + BATCH])
        noise = torch.randn(len(chunk), *backbone.latent_shape, generator=rng)  # [B, C, H, W]
        cond, negative = backbone.embed(chunk), backbone.embed([""] * len(chunk), negative=True)
        parts.append(backbone.decode(backbone.sample(denoiser, noise, cond, negative, steps, guidance)))
    return to_float(torch.cat(parts).permute(0, 2, 3, 1).numpy())


def print_report(report: Mapping[str, float]) -> None:
    """A table of the measured values."""
    table = Table("measured", "value")
    for name, value in report.items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)


def _share(right: Tensor) -> float:
    return right.float().mean().item()
