"""SAeUron: a sparse autoencoder of one block tells which features a concept has, and inverts them while drawing.

Cywinski and Deja, arXiv 2501.18052. The autoencoder learns the outputs of one transformer block, in the half of the
prompt, at all steps of the sampler. At each step a feature scores its share of the activation on a target's images less
its share on the others'; those above a percentile are the target's. While images are drawn, where such a feature
exceeds its mean over all concepts, it is multiplied by minus `strength` times its mean on the target. What the
autoencoder cannot reconstruct is added back, in the released code with the opposite sign.

Ours: it learns from images of the targets, the superclasses and the kept concepts, a sample of their positions (the
published one from all of a benchmark's anchor prompts); a step that was not fitted uses the scores of the step nearest
in time; a feature that several targets share takes the multiplier that is farthest from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.core.files import derived_seed
from sculpt_dist.guards.base import Fitting, Guard
from sculpt_dist.guards.parts.activations import as_rows, drawn_activations, from_rows
from sculpt_dist.guards.parts.autoencoder import Autoencoder, Training, train_autoencoder
from sculpt_dist.guards.parts.calls import Clock, with_output
from sculpt_dist.guards.parts.layers import transformer_blocks
from sculpt_dist.maths.sparse_codes import feature_scores, largest


@dataclass(frozen=True)
class Config:
    """The options of saeuron."""

    name: str = "saeuron"
    """Name of this guard."""
    block: int | None = None
    """Number of the transformer block in a forward pass, from 0; null: the middle one (up_blocks.1.attentions.1 of
    Stable Diffusion 1.x, the published one for objects)."""
    expansion: int = 16
    """Features per number of the block's width."""
    active: int = 32
    """Features that count per vector, k."""
    positions: int = 32
    """Positions per image and step from which the autoencoder learns; published: all."""
    epochs: int = 5
    """Passes through the collected vectors."""
    batch: int = 4096
    """Vectors per update of the autoencoder."""
    lr: float = 4e-4
    """Learning rate of the autoencoder, falling linearly to 0."""
    auxk_alpha: float = 0.03125
    """Weight of the term that revives dead features."""
    dead_after: int = 10_000_000
    """Vectors without a code after which a feature counts as dead."""
    percentile: float = 99.99
    """Percentile of the scores above which a feature is the target's."""
    strength: float = 1.0
    """A feature of the target is multiplied by minus this, times its mean activation on the target (published: a
    multiplier of -1 for styles, of -1 to -30 for objects)."""


class Method(Guard):
    """Changes the output of one block."""

    def __init__(self, config: Config) -> None:
        if config.active < 1 or config.expansion < 1 or not 0 <= config.percentile < 100:
            raise ConfigError(
                f"method.active={config.active}, method.expansion={config.expansion}, method.percentile="
                f"{config.percentile}: the first two must be at least 1, the last from 0 to below 100"
            )
        if min(config.batch, config.positions, config.epochs) < 1:
            raise ConfigError(
                f"method.batch={config.batch}, method.positions={config.positions}, method.epochs={config.epochs}: all "
                "must be at least 1"
            )
        super().__init__(config)

    def fit(self, fitting: Fitting) -> Mapping[str, Tensor]:
        """The autoencoder, the times of the steps [T], and for each the factors and bounds of all features [T, F]."""
        backbone, prepare, config = fitting.backbone, fitting.prepare, self.config
        block, groups = self._block(backbone.net), _groups(fitting)
        found: dict[str, Tensor] = {}
        times = torch.empty(0)
        for name, prompts in groups.items():
            drawn = list(drawn_activations(backbone, block, prompts, prepare, config.positions, fitting.seed))
            times = drawn[0][0]
            found[name] = torch.cat([batch.flatten(1, 2) for _, batch in drawn], 1)  # [T, N, D]
        vectors = torch.cat([of_group.flatten(0, 1) for of_group in found.values()])
        settings = (config.expansion, config.active, config.epochs, config.batch, config.lr)
        rng = torch.Generator().manual_seed(derived_seed(fitting.seed, "autoencoder"))
        model = train_autoencoder(vectors, Training(*settings, config.auxk_alpha, config.dead_after), rng)
        means = {name: _mean_codes(model, of_group, config.active) for name, of_group in found.items()}
        factors, bounds = self._chosen(means, fitting.targets)
        return {**model.tensors(), "times": times, "factors": factors, "bounds": bounds}

    def act(
        self, net: nn.Module, fitted: Mapping[str, Tensor], doubled: Callable[[], bool]
    ) -> Iterable[RemovableHandle]:
        block, clock = self._block(net), Clock()
        edit = FeatureEdit(self.config.active, fitted, clock)
        return [net.register_forward_pre_hook(clock.read, with_kwargs=True), block.register_forward_hook(edit.after)]

    def _block(self, net: nn.Module) -> nn.Module:
        blocks = list(transformer_blocks(net).values())
        number = len(blocks) // 2 if self.config.block is None else self.config.block
        if not 0 <= number < len(blocks):
            raise ConfigError(f"method.block={number}: the denoiser has transformer blocks 0 to {len(blocks) - 1}")
        return blocks[number]

    def _chosen(self, means: Mapping[str, Tensor], targets: Iterable[str]) -> tuple[Tensor, Tensor]:
        """(factor of every feature, the bound that it must exceed), [T, F]; 1 and infinity where nothing happens."""
        overall = torch.stack(list(means.values())).mean(0)
        factors, bounds = torch.ones_like(overall), torch.full_like(overall, torch.inf)
        for target in targets:
            others = torch.stack([of_group for name, of_group in means.items() if name != target]).mean(0)
            for step, (mine, rest) in enumerate(zip(means[target], others)):
                scores = feature_scores(mine, rest)
                chosen = scores > scores.quantile(self.config.percentile / 100)
                factor = -self.config.strength * mine
                stronger = chosen & ((factor.abs() > factors[step].abs()) | bounds[step].isinf())
                factors[step] = torch.where(stronger, factor, factors[step])
                bounds[step] = torch.where(chosen, overall[step], bounds[step])
        return factors, bounds


class FeatureEdit:
    """Changes the features of one block's output."""

    def __init__(self, active: int, fitted: Mapping[str, Tensor], clock: Clock) -> None:
        self.active, self.fitted, self.clock = active, fitted, clock

    def after(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return with_output(output, self.changed)

    def changed(self, output: Tensor) -> Tensor:
        """[B, D, H, W] or [B, N, D] -> the same: x + (decoded changed codes - decoded codes)."""
        fitted = self.fitted = {name: tensor.to(output.device) for name, tensor in self.fitted.items()}  # moved once
        model, rows = Autoencoder.of(fitted), as_rows(output).float()
        if rows.shape[-1] != len(model.bias):
            raise ModelError(
                f"the guard saeuron was fitted to a block of width {len(model.bias)}, this one has {rows.shape[-1]}"
            )
        step = int((fitted["times"] - self.clock.time).abs().argmin())
        codes = largest(model.codes(rows), self.active)
        over = codes > fitted["bounds"][step]
        difference = torch.where(over, codes * (fitted["factors"][step] - 1), 0)
        return from_rows(rows + difference @ model.decoder, output)


def _groups(fitting: Fitting) -> dict[str, tuple[str, ...]]:
    """Prompts by concept: the targets, their superclasses, and all that is kept."""
    groups: dict[str, tuple[str, ...]] = {}
    for prompts in fitting.concepts:
        target, superclass = prompts.names
        groups[target] = tuple(dict.fromkeys(prompts.target))
        groups.setdefault(superclass or "", tuple(dict.fromkeys(prompts.superclass)))
    kept = tuple(dict.fromkeys(text for prompts in fitting.concepts for text in prompts.keep))
    return groups | ({"to keep": kept} if kept else {})


def _mean_codes(model: Autoencoder, vectors: Tensor, active: int) -> Tensor:
    """The mean codes of [T, N, D], step by step, [T, F]."""
    return torch.stack([largest(model.codes(of_step), active).mean(0) for of_step in vectors]).cpu()
