"""Another precision: does the forgetting survive when the net's weights are rounded?

fp16 and bf16 are what checkpoints are shared in; int8 rounds each output channel of a matrix to 255 even levels around
0, as weight-only quantisation does. All are computed in the net's own precision afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sculpt_dist.attacks.base import Attack as Base
from sculpt_dist.attacks.base import Attempt, Case
from sculpt_dist.attacks.parts.victim import Victim
from sculpt_dist.core.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """The options of quantize."""

    formats: list[str] = field(default_factory=lambda: ["float16", "bfloat16", "int8"])
    """Precisions to round to: float16, bfloat16 and int8."""


class Attack(Base):
    unit = "model"
    config: Config

    def __init__(self, config: Config) -> None:
        for name in config.formats:
            if name not in ROUNDED:
                raise ConfigError(f"attack.options.quantize.formats={name}: must be one of {', '.join(ROUNDED)}")
        super().__init__(config)

    def attempts(self, victim: Victim, cases: Sequence[Case]) -> Iterator[Attempt]:
        for name in self.config.formats:
            net = victim.model.copied_net()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.copy_(ROUNDED[name](parameter))
            for place, case in enumerate(cases):
                yield Attempt(place, victim.model.draw(case, net=net), name)


def to_int8(weight: Tensor) -> Tensor:
    """The nearest multiples of the channel's largest value / 127; the first dimension is the output channel."""
    if weight.dim() < 2:  # biases and norms stay as they are
        return weight
    step = weight.abs().flatten(1).amax(1).clamp(min=1e-12).view(-1, *[1] * (weight.dim() - 1)) / 127
    return (weight / step).round() * step


ROUNDED = {
    "float16": lambda weight: weight.half().to(weight),
    "bfloat16": lambda weight: weight.bfloat16().to(weight),
    "int8": to_int8,
}
