"""The model under attack, the original beside it, and all that an attack may do with them.

Letters in shapes: B batch, C latent channels, H W latent size, h w image size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sculpt_dist.attacks.base import Case
from sculpt_dist.backbones.parts.guidance import Guided
from sculpt_dist.backbones.parts.sampling import sampled_latents
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import derived_seed
from sculpt_dist.core.types import TextCond

if TYPE_CHECKING:
    from sculpt_dist.backbones.base import Backbone


class Model:
    """A pipeline that draws. Its weights never move."""

    def __init__(self, backbone: Backbone, steps: int) -> None:
        """`steps`: of the sampler."""
        self.backbone, self.steps = backbone, steps

    @property
    def net(self) -> nn.Module:
        net: nn.Module = self.backbone.net
        return net

    def copied_net(self) -> nn.Module:
        """A copy of the net with its guard, whose passes count as the model's.

        `deepcopy` would copy the pipeline through its hooks.
        """
        net = self.backbone.empty_net().to(self.backbone.device, next(self.net.parameters()).dtype)
        net.load_state_dict(self.net.state_dict())
        self.backbone.adopt(net)
        return net.requires_grad_(False).eval()

    def noise(self, seed: int) -> Tensor:
        """The noise with which the image of a seed begins, [1, C, H, W]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(1, *self.backbone.latent_shape, generator=generator).to(self.backbone.device)

    def embed(self, prompt: str) -> TextCond:
        return self.backbone.embed([prompt])

    def predict(self, latents: Tensor, time: Tensor, cond: TextCond) -> Tensor:
        """The net's prediction without guidance, [B, C, H, W]; `time` [B]."""
        return self.backbone.denoise(self.net, latents, time, cond)

    def guided(self, case: Case, cond: TextCond | None = None, net: nn.Module | None = None) -> Guided:
        """The guided prediction of one image; `cond` in place of the case's prompt, `net` in place of the model's."""
        cond = self.embed(case.prompt) if cond is None else cond
        negative = self.backbone.embed([""], negative=True)
        return self.backbone.guided(self.backbone.denoiser(net or self.net), cond, negative, case.guidance)

    def latents(self, predict: Guided, noise: Tensor) -> Tensor:
        """Clean latents [B, C, H, W], drawn with a guided prediction from unit noise."""
        return sampled_latents(self.backbone.schedule, predict, noise, self.steps)

    def image(self, latents: Tensor) -> Tensor:
        """[1, C, H, W] -> uint8 [3, h, w] on the CPU."""
        return self.backbone.decode(latents)[0].cpu()

    def draw(self, case: Case, cond: TextCond | None = None, net: nn.Module | None = None) -> Tensor:
        """The image of a case, uint8 [3, h, w]."""
        with torch.no_grad():
            return self.image(self.latents(self.guided(case, cond, net), self.noise(case.seed)))


@dataclass(frozen=True)
class Victim:
    """The unlearned model, with what an attack may use beside it."""

    model: Model
    original: Model | None  # from before the unlearning
    seed: int
    run: Path | None = None  # the folder of the run
    unrelated: tuple[str, ...] = ()  # prompts that ask for no forgotten concept

    @property
    def device(self) -> torch.device:
        return self.model.backbone.device

    def rng(self, *about: str | int | float) -> torch.Generator:
        """A generator on the CPU for what these values name, the same on any number of ranks."""
        return torch.Generator().manual_seed(derived_seed(self.seed, "attack", *map(str, about)))

    @property
    def known(self) -> Model:
        """The original model, for an attack that needs it."""
        assert self.original is not None, "the driver refuses such an attack where there is no original model"
        return self.original

    def reference(self, case: Case) -> Tensor:
        """The clean latent of the image that the original model draws for a case, [1, C, H, W]."""
        with torch.no_grad():
            return self.known.latents(self.known.guided(case), self.known.noise(case.seed))

    def references(self, case: Case, count: int) -> Tensor:
        """Clean latents of `count` images of the case's concept with other seeds, [count, C, H, W]."""
        others = [
            replace(case, seed=derived_seed(self.seed, "reference", case.concept.target, i)) for i in range(count)
        ]
        return torch.cat([self.reference(other) for other in others])


def times(model: Model, count: int) -> list[Tensor]:
    """`count` times spread evenly over the schedule, from little noise to much, each [1]."""
    middles = (torch.arange(count) + 0.5) / count
    return list(model.backbone.sample_time(middles).split(1))


def check_alike(model: Model, original: Model | None) -> None:
    """Raises ConfigError where the latents or the predictions of the two models do not mean the same."""
    if original is None:
        return
    pairs = {
        "latents": (model.backbone.latent_shape, original.backbone.latent_shape),
        "prediction": (model.backbone.schedule.prediction, original.backbone.schedule.prediction),
        "scaling factor": tuple(one.backbone.vae.config.get("scaling_factor") for one in (model, original)),
    }
    different = [name for name, (ours, theirs) in pairs.items() if ours != theirs]
    ours, theirs = (one.backbone.vae.state_dict() for one in (model, original))
    if ours.keys() != theirs.keys() or not all(_is_rounded(ours[name], theirs[name]) for name in ours):
        different.append("autoencoder")
    original.backbone.release("vae")  # nothing else needs it
    if different:
        raise ConfigError(
            f"{original.backbone.folder}: its {different[0]} is not that of {model.backbone.folder}: give the model "
            "from which it was made with --original"
        )


def _is_rounded(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same but for the rounding to a dtype of 8 bits or more."""
    a, b = tensor.float(), other.float()
    return a.shape == b.shape and bool((a - b).norm() <= 2**-8 * a.norm())
