"""Safe Latent Diffusion: a third prediction, for the targets' names, turns the guidance away from them.

Schramowski et al., arXiv 2211.05105. With the guidance g, the pipeline's result becomes

    e_u + g (e_c - e_u - gamma),   gamma = mu(e_c, e_S) (e_S - e_u) + s_m nu,   nu' = b_m nu + (1 - b_m) gamma

The four levels are those that diffusers documents for StableDiffusionPipelineSafe. The warm-up counts steps of the
sampler, of which there are 50 by default there. Guidance makes two passes per step, this guard three.
Where there is no guidance, it does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.guards.base import Fitting, Guard
from sculpt_dist.guards.parts.calls import Arguments, rows_of, stored_text, time_of, with_output, with_rows
from sculpt_dist.maths.safe_guidance import safety_term

LEVELS = {  # warmup, scale, threshold, momentum, decay
    "weak": (15, 20.0, 0.0, 0.0, 0.0),
    "medium": (10, 1000.0, 0.01, 0.3, 0.4),
    "strong": (7, 2000.0, 0.025, 0.5, 0.7),
    "max": (0, 5000.0, 1.0, 0.5, 0.7),
}


@dataclass(frozen=True)
class Config:
    """The options of sld."""

    name: str = "sld"
    """Name of this guard."""
    level: str = "medium"
    """The published settings where the following ones are null: weak, medium, strong or max."""
    warmup: int | None = None
    """Steps of the sampler before the guidance is turned, delta."""
    scale: float | None = None
    """Scale of the turn, s_S."""
    threshold: float | None = None
    """The turn acts where the prompt's prediction exceeds the concept's by less than this, lambda."""
    momentum: float | None = None
    """Weight of the momentum, s_m."""
    decay: float | None = None
    """Decay of the momentum, beta_m."""
    text: str | None = None
    """Concept to avoid; null: the targets' names, with commas between them."""

    def values(self) -> tuple[float, float, float, float, float]:
        """(warmup, scale, threshold, momentum, decay)."""
        given = (self.warmup, self.scale, self.threshold, self.momentum, self.decay)
        warmup, scale, threshold, momentum, decay = (
            published if own is None else own for own, published in zip(given, LEVELS[self.level])
        )
        return warmup, scale, threshold, momentum, decay


class Method(Guard):
    """Adds a third row per image to every guided call."""

    def __init__(self, config: Config) -> None:
        if config.level not in LEVELS:
            raise ConfigError(f"method.level={config.level}: choose one of {', '.join(LEVELS)}")
        super().__init__(config)

    def fit(self, fitting: Fitting) -> Mapping[str, Tensor]:
        text = self.config.text or ", ".join(fitting.targets)
        return stored_text(fitting.backbone.embed([text]))

    def act(
        self, net: nn.Module, fitted: Mapping[str, Tensor], doubled: Callable[[], bool]
    ) -> Iterable[RemovableHandle]:
        turn = Turn(self.config, fitted, doubled)
        before = net.register_forward_pre_hook(turn.before, with_kwargs=True)
        return [before, net.register_forward_hook(turn.after)]


class Turn:
    """The hooks, and the momentum of the images that are drawn now."""

    def __init__(self, config: Config, fitted: Mapping[str, Tensor], doubled: Callable[[], bool]) -> None:
        self.fitted, self.doubled, self.values = fitted, doubled, config.values()
        self.active, self.step, self.time, self.first = False, 0, 0.0, 0.0
        self.momentum = torch.zeros(())  # nu, [B, C, H, W] from the first step on

    def before(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """[negative, prompt] -> [negative, prompt, concept]."""
        self.active = self.doubled()
        if not self.active:
            return None
        time, size = time_of(args, kwargs), len(args[0]) // 2
        # within a drawing some samplers repeat a time, but never the first one
        begins = time > self.time or time == self.first or self.momentum.shape[:1] not in ((), (size,))
        if begins:
            self.first, self.momentum = time, torch.zeros(())
        self.step, self.time = 0 if begins else self.step + 1, time

        def tripled(name: str | None, rows: Tensor) -> Tensor:
            concept = rows[size:] if name is None else rows_of(self.fitted, name, rows, size)
            return torch.cat([rows, concept])

        return with_rows(args, kwargs, tripled)

    def after(self, net: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Three predictions -> [e_u, e_c - gamma]."""
        return with_output(output, self.turned) if self.active else None

    def turned(self, predicted: Tensor) -> Tensor:
        warmup, scale, threshold, weight, decay = self.values
        plain, conditioned, concept = predicted.float().chunk(3)
        momentum = self.momentum.to(plain.device)
        gamma = safety_term(plain, conditioned, concept, scale, threshold, momentum, weight)
        self.momentum = (decay * momentum + (1 - decay) * gamma).detach()
        if self.step >= warmup:
            conditioned = conditioned - gamma
        return torch.cat([plain, conditioned]).to(predicted.dtype)
