"""The classifiers of a world: small convolutional nets that name the object and the style of an image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sculpt_dist.core.errors import ModelError
from sculpt_dist.core.files import make_folder, write_atomically
from sculpt_dist.worlds.base import ClassifierPlan, World
from sculpt_dist.worlds.training import Descent, descend


class WorldClassifier(nn.Module):
    """Convolutions, mean and maximum pooling, and a linear head each for objects and styles."""

    def __init__(self, plan: ClassifierPlan, num_objects: int, num_styles: int) -> None:
        super().__init__()
        steps = list(zip((3, *plan.channels), plan.channels, plan.strides))
        self.features = nn.Sequential(*(_LAYERS[plan.layers](*step) for step in steps))
        self.object_head = nn.Linear(2 * plan.channels[-1], num_objects)
        self.style_head = nn.Linear(2 * plan.channels[-1], num_styles)

    def pooled(self, pixels: Tensor) -> Tensor:
        """Float pixels [B, 3, h, w] in [-1, 1] -> [B, D]; the image features of FID and KID."""
        maps = self.features(pixels)  # [B, C, H, W]
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Float pixels [B, 3, h, w] in [-1, 1] -> object logits [B, objects], style logits [B, styles]."""
        pooled = self.pooled(pixels)
        return self.object_head(pooled), self.style_head(pooled)


def to_float(pixels: np.ndarray | Tensor) -> Tensor:
    """Images uint8 [N, h, w, 3] -> float pixels [N, 3, h, w] in [-1, 1]."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_classifier(
    world: World,
    name: str,
    pixels: np.ndarray,
    objects: np.ndarray,
    styles: np.ndarray,
    seed: int,
    file: Path | None = None,
    made_from: str = "",
) -> WorldClassifier:
    """Train on images, uint8 pixels [N, h, w, 3], with indices objects [N] and styles [N].

    Noise and blur are added to the images, so that the softness of sampled ones does not mislead the classifier. A
    training that was saved in `file` goes on.
    """
    plan = world.classifiers[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WorldClassifier(plan, len(world.objects), len(world.styles)).train()
    rng = torch.Generator().manual_seed(seed)
    object_ids, style_ids = torch.as_tensor(objects), torch.as_tensor(styles)

    def loss() -> Tensor:
        chosen = torch.randint(len(pixels), (plan.batch,), generator=rng)
        object_logits, style_logits = model(_soften(to_float(pixels[chosen.numpy()]), rng))
        return F.cross_entropy(object_logits, object_ids[chosen]) + F.cross_entropy(style_logits, style_ids[chosen])

    descent = Descent(plan.steps, plan.rate, warmup=50, betas=(0.9, 0.999), clip=None)
    descend({"classifier": model}, loss, descent, rng, name, file, made_from)
    return model.eval()


def save_classifier(model: WorldClassifier, path: Path) -> None:
    """Write the weights as safetensors."""
    make_folder(path.parent)
    write_atomically(path, save(model.state_dict()))


def load_classifier(world: World, name: str, path: Path) -> WorldClassifier:
    """The classifier `name` of a world from the file `path`, in eval mode and frozen.

    Raises ModelError when the file is missing or does not hold this classifier.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file: this package lacks the {name} of that world; install it again")
    model = WorldClassifier(world.classifiers[name], len(world.objects), len(world.styles))
    try:
        with safe_open(path, "pt") as content:
            model.load_state_dict({key: content.get_tensor(key) for key in model.state_dict()})
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path}: does not hold the weights of this world's {name}: {error}") from error
    return model.eval().requires_grad_(False)


def _plain(num_in: int, num_out: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU())


class _Separable(nn.Module):
    """A strided 3 x 3 depthwise and a 1 x 1 convolution, then the same as a residual branch."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.down = self._pair(num_in, num_out, stride)
        self.branch = self._pair(num_out, num_out, 1)

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.down(maps)
        return maps + self.branch(maps)

    @staticmethod
    def _pair(num_in: int, num_out: int, stride: int) -> nn.Sequential:
        depthwise = nn.Conv2d(num_in, num_in, 5, stride, 2, groups=num_in)
        return nn.Sequential(depthwise, nn.Conv2d(num_in, num_out, 1), nn.GroupNorm(8, num_out), nn.SiLU())


_LAYERS = {"plain": _plain, "separable": _Separable}


def _soften(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Pixels [B, 3, h, w], each image with random noise and randomly blended with a blurred copy of itself."""
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = 0.8 * torch.rand(len(pixels), 1, 1, 1, generator=rng)
    share = share * (torch.rand(len(pixels), 1, 1, 1, generator=rng) < 0.5)  # half of the images stay sharp
    strength = 0.12 * torch.rand(len(pixels), 1, 1, 1, generator=rng)
    return torch.lerp(pixels, blurred, share) + strength * torch.randn(pixels.shape, generator=rng)
