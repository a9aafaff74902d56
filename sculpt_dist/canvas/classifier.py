"""The canvas classifier: a small convolutional net that names the object and the style of a 32 x 32 image."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sculpt_dist.canvas.world import OBJECTS, STYLES
from sculpt_dist.core.errors import ModelError

SHIPPED_CLASSIFIER = Path(__file__).parents[1] / "assets" / "canvas" / "classifier.safetensors"

BATCH = 128
NUM_STEPS = 500
PEAK_RATE = 3e-3


class CanvasClassifier(nn.Module):
    """Four convolutions, mean and maximum pooling, and a linear head each for objects and styles (63k weights)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _convolution(3, width, stride=1),
            _convolution(width, 2 * width, stride=2),
            _convolution(2 * width, 4 * width, stride=2),
            _convolution(4 * width, 4 * width, stride=2),
        )
        self.object_head = nn.Linear(8 * width, len(OBJECTS))
        self.style_head = nn.Linear(8 * width, len(STYLES))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Float pixels [B, 3, 32, 32] in [-1, 1] -> object logits [B, 12], style logits [B, 5]."""
        maps = self.features(pixels)  # [B, 64, 4, 4]
        pooled = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)  # [B, 128]
        return self.object_head(pooled), self.style_head(pooled)


def to_float(pixels: np.ndarray | Tensor) -> Tensor:
    """Drawings uint8 [N, 32, 32, 3] -> float pixels [N, 3, 32, 32] in [-1, 1]."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_classifier(pixels: np.ndarray, objects: np.ndarray, styles: np.ndarray, seed: int) -> CanvasClassifier:
    """Train on drawings, uint8 pixels [N, 32, 32, 3], with indices objects [N] and styles [N].

    Takes a fixed number of steps on the CPU. Noise and blur are added to the drawings, so that the softness of sampled
    images does not mislead the classifier.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CanvasClassifier()
    rng = torch.Generator().manual_seed(seed)
    inputs, object_ids, style_ids = to_float(pixels), torch.as_tensor(objects), torch.as_tensor(styles)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_RATE, weight_decay=1e-2)
    model.train()
    for step in track(range(NUM_STEPS), description="classifier"):
        warmup, decay = min(1, (step + 1) / 50), 0.5 + 0.5 * math.cos(math.pi * step / NUM_STEPS)
        optimizer.param_groups[0]["lr"] = PEAK_RATE * warmup * decay
        chosen = torch.randint(len(inputs), (BATCH,), generator=rng)
        object_logits, style_logits = model(_soften(inputs[chosen], rng))
        loss = F.cross_entropy(object_logits, object_ids[chosen]) + F.cross_entropy(style_logits, style_ids[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def save_classifier(model: CanvasClassifier, path: Path) -> None:
    """Write the weights as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), str(path))


def load_classifier(path: Path | None = None) -> CanvasClassifier:
    """The classifier in the file `path`, or the shipped one, in eval mode and frozen.

    Raises ModelError when the file is missing or does not hold a classifier.
    """
    path = Path(path) if path is not None else SHIPPED_CLASSIFIER
    if not path.is_file():
        raise ModelError(
            f"{path}: no such file: give the classifier.safetensors that `build_canvas` wrote, or no path for the "
            "shipped classifier"
        )
    model = CanvasClassifier()
    try:
        model.load_state_dict(load_file(str(path)))
    except (RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path}: does not hold the weights of a canvas classifier: {error}") from error
    return model.eval().requires_grad_(False)


def _convolution(num_in: int, num_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU())


def _soften(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Pixels [B, 3, 32, 32], each image with random noise and randomly blended with a blurred copy of itself."""
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = 0.8 * torch.rand(len(pixels), 1, 1, 1, generator=rng)
    share = share * (torch.rand(len(pixels), 1, 1, 1, generator=rng) < 0.5)  # half of the images stay sharp
    strength = 0.12 * torch.rand(len(pixels), 1, 1, 1, generator=rng)
    return torch.lerp(pixels, blurred, share) + strength * torch.randn(pixels.shape, generator=rng)
