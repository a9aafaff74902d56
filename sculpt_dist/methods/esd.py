"""Erased Stable Diffusion: negative guidance for the target's prompt (Gandikota et al., arXiv 2303.07345).

Let e be the student, e0 the model before this concept, c the target's prompt, x latents that the student draws for c,
and "" the empty prompt:

    L = MSE(e(x, c), e0(x, "") - eta (e0(x, c) - e0(x, "")))

x is the input of a random sampler step, which the whole batch shares. `erase_from: superclass` erases the target from
its superclass alone, as the authors' code does with a second prompt. With that prompt s, and x drawn for s:

    L = MSE(e(x, s), e0(x, s) - eta (e0(x, c) - e0(x, "")))

The paper erases one concept, with the original model as e0. For a sequence of concepts, e0 here is the model before
each concept, so that earlier targets stay forgotten; `reference: original` restores the published choice. Several
concepts at once: `train.together`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import Losses
from sculpt_dist.data.streams import StreamSpec
from sculpt_dist.maths.losses import mse, negative_guidance
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.base import Step, matrices

GROUPS = {"x": "cross_attention", "u": "not_cross_attention", "full": "all"}


@dataclass(frozen=True)
class Config:
    """The options of esd."""

    name: str = "esd"
    """Name of this method."""
    variant: str = "x"
    """What trains: x, the cross-attention (styles); u, everything else (objects, nudity); full, all."""
    eta: float = 1.0
    """Strength of the negative guidance."""
    guidance: float = 3.0
    """Guidance scale with which the student draws its latents."""
    sampler_steps: int = 50
    """Sampler steps of these latents."""
    erase_from: str = "target"
    """Prompts from which the target is erased: target, its own, or superclass."""
    reference: str = "teacher"
    """Net that gives the label, e0: teacher or original."""


class Method(Base):
    """Trains the variant's matrices; needs no stored samples."""

    def __init__(self, config: Config) -> None:
        if config.variant not in GROUPS:
            raise ConfigError(f"method.variant={config.variant}: choose one of {', '.join(GROUPS)}")
        if config.reference not in ("teacher", "original"):
            raise ConfigError(f"method.reference={config.reference}: choose teacher or original")
        if config.erase_from not in ("target", "superclass"):
            raise ConfigError(f"method.erase_from={config.erase_from}: choose target or superclass")
        if config.sampler_steps < 1:
            raise ConfigError(f"method.sampler_steps={config.sampler_steps}: must be at least 1")
        self.config = config
        self.needs_original = config.reference == "original"
        self.needs_teacher = config.reference == "teacher"

    def streams(self) -> Sequence[StreamSpec]:
        return (StreamSpec("target", latents=False),)

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        return matrices(groups, GROUPS[self.config.variant])

    def saliency(self, step: Step) -> Losses:
        return self.losses(step)

    def losses(self, step: Step) -> Losses:
        config, target = self.config, step.batch.target
        from_target = config.erase_from == "target"
        cond = target.cond if from_target else step.batch.target_as_superclass
        empty_cond, index = step.empty(len(cond)), int(step.rng.shared("index") * config.sampler_steps)
        latents, time = step.fresh_latents(index, config.sampler_steps, config.guidance, target.prompts, cond)
        conds = [empty_cond, target.cond] + ([] if from_target else [cond])
        empty, with_prompt, *base = step.frozen(config.reference).without_gradient([(latents, time, c) for c in conds])
        label = negative_guidance(empty, with_prompt, config.eta) + (base[0] - empty if base else 0.0)
        return Losses({"forget": mse(step.student(latents, time, cond), label)})
