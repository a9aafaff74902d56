"""Key Step Concept Unlearning: trains the late steps of the sampler, on the student's own latents.

arXiv 2507.06526.

Let e be the student, e0 the model before this concept, x_i latents that the student draws for the prompt c up to step
i, and "" the empty prompt:

    erase  = e0(x_i, "") - (e0(x_i, c) - e0(x_i, ""))
    uncond = e0(x_i, "") - l(t) (e0(x_i, c) - e0(x_i, "")),   l = (1000 - t) 2e-5, or 0.02 (1 - sigma) for flow
    L = MSE(e(x_i, c~), erase) + 1e-4 MSE(e(x_i, ""), uncond)

i cycles through S, S + 1, ..., the last step; one c lasts from S to the end. After 8 traversals S grows by one, but
stays below 0.9 of the steps. c~ is c, except in the last 5 % of the updates, where it is a disturbed prompt: its words
are shuffled, a word that does not name the target is dropped, or a prefix or suffix is added, and the embedding gets
noise. All latents of a batch share i. UNVERIFIED: two releases differ by a factor of 4 to 5 in l. The prefixes and
suffixes are our own, and so is a separate disturbance for each sample of a batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import Losses, TextCond
from sculpt_dist.data.streams import StreamSpec
from sculpt_dist.maths.losses import mse, negative_guidance
from sculpt_dist.maths.rounding import round_to_bf16
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.base import Setup, Step, matrices

TRAVERSALS = 8
LAST_START = 0.9  # of the steps, which the start stays below: 44 of 50, 25 of 28
DISTURBED = 0.95  # of the updates, from where c~ is disturbed
PREFIXES, SUFFIXES = ("a picture of", "an image with"), ("in detail", "in the background")


@dataclass(frozen=True)
class Config:
    """The options of kscu."""

    name: str = "kscu"
    """Name of this method."""
    sampler_steps: int = 50
    """Sampler steps of the student's latents: 50, or 28 for flow."""
    start: int = 14
    """First key step, S. Published for 50 steps: 14 nudity and objects, 24 styles, 40 instances; for 28: 8, 14, 22."""
    trains: str = "not_cross_attention"
    """Group of parameters that trains: not_cross_attention for objects, cross_attention for styles and instances."""
    guidance: float = 3.0
    """Guidance scale with which the student draws: 3, or 3.5 for flow."""
    leakage_weight: float = 1e-4
    """Weight of the term on the empty prompt."""
    leakage: float = 0.02
    """Leakage coefficient l at time 0, which falls to 0 at full noise."""
    disturbance: float = 1e-5
    """Standard deviation of the noise on the embedding in the last updates."""


class Method(Base):
    """Trains one group's matrices on its own key steps; needs no stored samples."""

    def __init__(self, config: Config, variants: Mapping[str, Sequence[str]] = {}) -> None:
        """`variants`: the disturbed forms of each of the target's prompts."""
        if not 0 <= config.start < config.sampler_steps:
            raise ConfigError(f"method.start={config.start}: must be below method.sampler_steps={config.sampler_steps}")
        self.config, self.variants = config, variants

    def prepare(self, setup: Setup) -> Method:
        """Embed the concept's disturbed prompts while the text encoders are loaded; prompts too long for them are
        left out.
        """
        variants = {}
        for target, superclass in zip(setup.prompts.target, setup.prompts.superclass):
            variants[target] = [text for text in disturbed_prompts(target, superclass) if setup.backbone.takes(text)]
            setup.backbone.embed(variants[target])
        return Method(self.config, variants)

    def streams(self) -> Sequence[StreamSpec]:
        return (StreamSpec("target", latents=False),)

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        return matrices(groups, self.config.trains)

    def saliency(self, step: Step) -> Losses:
        return self.losses(step)

    def losses(self, step: Step) -> Losses:
        config = self.config
        index = key_step(step.update, config.start, config.sampler_steps)
        latents, time, prompts = step.student_latents(index, config.sampler_steps, config.guidance)
        cond, empty_cond = step.backbone.embed(prompts), step.empty(len(prompts))
        empty, with_prompt = step.frozen("teacher").all([(latents, time, empty_cond), (latents, time, cond)])
        leak = (config.leakage * (1 - step.backbone.noise_level(time))).view(-1, 1, 1, 1)  # [B, 1, 1, 1]
        disturbed = self._disturbed(step, prompts) if step.progress >= DISTURBED else cond
        forgets, leaks = step.student.all([(latents, time, disturbed), (latents, time, empty_cond)])
        return Losses(
            {
                "forget": mse(forgets, negative_guidance(empty, with_prompt, 1.0)),
                "leakage": config.leakage_weight * mse(leaks, negative_guidance(empty, with_prompt, leak)),
            }
        )

    def _disturbed(self, step: Step, prompts: Sequence[str]) -> TextCond:
        """The prompts, each in one of its disturbed forms, with noise on the embeddings."""
        chosen = []
        for prompt, uniform in zip(prompts, step.rng.uniform("disturbed form").tolist()):
            forms = self.variants[prompt]
            chosen.append(forms[int(uniform * len(forms))])
        cond = step.backbone.embed(chosen)
        noise = step.rng.normal("disturbance", cond.tokens.shape[1:])
        tokens = cond.tokens.float() + self.config.disturbance * noise
        if next(step.student.net.parameters()).dtype == torch.bfloat16:  # plain rounding would drop the noise
            tokens = round_to_bf16(tokens, torch.special.ndtr(step.rng.normal("rounding", cond.tokens.shape[1:])))
        return replace(cond, tokens=tokens)


def disturbed_prompts(target: str, superclass: str) -> list[str]:
    """The forms that a target's prompt takes near the end.

    A word that the superclass's prompt contains, too, does not name the target.
    """
    words, shared = target.split(), superclass.split()
    forms = [target]
    forms += [" ".join(random.Random(f"{target} {i}").sample(words, len(words))) for i in range(2)]
    forms += [" ".join(words[:i] + words[i + 1 :]) for i, word in enumerate(words) if word in shared]
    forms += [f"{prefix} {target}" for prefix in PREFIXES] + [f"{target} {suffix}" for suffix in SUFFIXES]
    return list(dict.fromkeys(forms))


def key_step(update: int, start: int, steps: int) -> int:
    """The sampler index that this update trains: entry `update` of S, S + 1, ..., steps - 1, repeated.

    S grows by one after 8 traversals.
    """
    last_start = math.ceil(LAST_START * steps) - 1
    while True:
        length = steps - start
        in_this_round = TRAVERSALS * length if start < last_start else update + 1
        if update < in_this_round:
            return start + update % length
        update, start = update - in_this_round, start + 1
