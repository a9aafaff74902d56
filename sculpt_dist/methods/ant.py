"""ANT: the early steps of the sampler keep their direction, the late ones reverse it (Li et al., arXiv 2504.12782).

Let e be the student, e0 the model before this concept, c the target's prompt, "" the empty prompt, D(x) = e0(x, c) -
e0(x, ""), and x+ and x- latents that the student draws for c, before an early and before a late step of the sampler:

    L = MSE(e(x-, c), e0(x-, "") - g D(x-)) + b MSE(e(x-, ""), e0(x-, ""))
        + a (MSE(e(x+, c), e0(x+, "") + g D(x+)) + b MSE(e(x+, ""), e0(x+, "")))

The published code for one concept differs, and `reference_compat: true` follows it: its terms on the empty prompt give
no gradient (they are left out here), and its "early" steps are the last ones of the sampler, near the clean image, so
that it keeps these and reverses the others. Its saliency mask keeps the half of the weights with the smallest
gradients, intersected over several seeds and prompts; that is not reproduced: `mask` is this program's. The paper
erases one concept with the original model as e0; in a sequence, e0 here is the model before each concept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import Losses
from sculpt_dist.data.streams import StreamSpec
from sculpt_dist.maths.losses import mse, negative_guidance
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.base import Request, Step, matrices


@dataclass(frozen=True)
class Config:
    """The options of ant."""

    name: str = "ant"
    """Name of this method."""
    early: int = 7
    """Steps of the sampler that keep their direction; the later ones reverse it."""
    sampler_steps: int = 50
    """Steps of the sampler."""
    guidance: float = 3.0
    """Guidance scale with which the student draws its latents."""
    strength: float = 1.0
    """Guidance of both labels, g."""
    keep_weight: float = 1.0
    """Weight of the steps that keep their direction, a."""
    empty_weight: float = 0.5
    """Weight of the terms on the empty prompt, b."""
    trains: str = "all"
    """Group of parameters that trains."""
    reference_compat: bool = False
    """Train as the published code does, where it differs from the paper (see above)."""


class Method(Base):
    """Trains one group's matrices; needs no stored samples."""

    def __init__(self, config: Config) -> None:
        if not 0 < config.early < config.sampler_steps:
            raise ConfigError(
                f"method.early={config.early}: must be above 0 and below method.sampler_steps={config.sampler_steps}"
            )
        self.config, self.compat = config, config.reference_compat

    def streams(self) -> Sequence[StreamSpec]:
        return (StreamSpec("target", latents=False),)

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        return matrices(groups, self.config.trains)

    def saliency(self, step: Step) -> Losses:
        return self.losses(step)

    def losses(self, step: Step) -> Losses:
        config, cond = self.config, step.batch.target.cond
        steps, cut = config.sampler_steps, config.sampler_steps - config.early if self.compat else config.early
        first, second = int(step.rng.shared("first") * cut), cut + int(step.rng.shared("second") * (steps - cut))
        empty = step.empty(len(cond))
        x_first, t_first = step.fresh_latents(first, steps, config.guidance, step.batch.target.prompts, cond)
        x_second, t_second = step.trajectory.advance_to(second, steps, step.student, cond, empty, config.guidance)
        keeps, turns = (x_first, t_first), (x_second, t_second)
        if self.compat:
            keeps, turns = turns, keeps
        requests: list[Request] = [(*turns, cond), (*keeps, cond), (*turns, empty), (*keeps, empty)]
        turns_c, keeps_c, turns_empty, keeps_empty = step.frozen("teacher").all(requests)
        labels = [
            negative_guidance(turns_empty, turns_c, config.strength),
            negative_guidance(keeps_empty, keeps_c, -config.strength),
            turns_empty,
            keeps_empty,
        ]
        weights = {
            "reverse": 1.0,
            "keep": config.keep_weight,
            "reverse empty": config.empty_weight,
            "keep empty": config.keep_weight * config.empty_weight,
        }
        predicted = step.student.all(requests[:2] if self.compat else requests)
        return Losses(
            {name: weight * mse(out, label) for (name, weight), out, label in zip(weights.items(), predicted, labels)}
        )
