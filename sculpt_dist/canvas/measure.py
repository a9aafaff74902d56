"""Measures the canvas models: what the classifier recognises in drawings, and in images sampled from a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from sculpt_dist.canvas.classifier import CanvasClassifier, to_float
from sculpt_dist.canvas.world import NUM_FORMS, OBJECTS, STYLES, SUPERCLASSES, prompt

if TYPE_CHECKING:
    from sculpt_dist.backbones.base import Backbone

BATCH = 60  # images sampled together

console = Console()


def measure_drawings(
    classifier: CanvasClassifier, pixels: np.ndarray, objects: np.ndarray, styles: np.ndarray
) -> tuple[float, float]:
    """Shares of drawings whose object, and whose style, the classifier recognises."""
    with torch.no_grad():
        object_logits, style_logits = classifier(to_float(pixels))
    return _accuracy(object_logits, torch.as_tensor(objects)), _accuracy(style_logits, torch.as_tensor(styles))


def measure_samples(
    backbone: Backbone, classifier: CanvasClassifier, per_pair: int = 8, seed: int = 1000
) -> dict[str, float]:
    """Accuracy of sampled images by caption form and by object, and how evenly superclass prompts draw their members.

    Keys: `object/form<k>`, `style/form<k>`; `<object>` (form 0); `<superclass>/<member>`, the share of that member.
    """
    pairs = [(i, j) for i in range(len(OBJECTS)) for j in range(len(STYLES)) for _ in range(per_pair)]
    objects, styles = (torch.tensor(column) for column in zip(*pairs))
    report: dict[str, float] = {}
    for form in track(range(NUM_FORMS), description="sampling", console=console):
        images = sample_images(backbone, [prompt(OBJECTS[i], STYLES[j], form) for i, j in pairs], seed=seed + form)
        with torch.no_grad():
            object_logits, style_logits = classifier(images)
        report[f"object/form{form}"] = _accuracy(object_logits, objects)
        report[f"style/form{form}"] = _accuracy(style_logits, styles)
        if form == 0:
            is_object = [objects == i for i in range(len(OBJECTS))]
            report |= {
                name: _accuracy(object_logits[chosen], objects[chosen]) for name, chosen in zip(OBJECTS, is_object)
            }
    for superclass, members in SUPERCLASSES.items():
        prompts = [prompt(superclass, style) for style in STYLES for _ in range(3 * per_pair)]
        with torch.no_grad():
            drawn = classifier(sample_images(backbone, prompts, seed=seed))[0].argmax(1)  # [N]
        shares = {name: (drawn == OBJECTS.index(name)).float().mean().item() for name in members}
        report |= {f"{superclass}/{name}": share for name, share in shares.items()}
    return report


def sample_images(
    backbone: Backbone, prompts: Sequence[str], steps: int = 8, guidance: float = 3.0, seed: int = 0
) -> Tensor:
    """One image per prompt, float pixels [N, 3, 32, 32] in [-1, 1]."""
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


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of `logits` [N, classes] that are largest at their label [N]."""
    return (logits.argmax(1) == labels).float().mean().item()
