"""AdvUnlearn: ESD under an attack by soft words before the prompt (Zhang et al., arXiv 2405.15234).

Let e be the student, e0 the model before this concept, c the target's prompt, r a prompt to retain, "" the empty one,
and d the embeddings of a few words before c. Every update first attacks, with Adam from random words of the vocabulary
and fresh noise and times in each of its steps, and then forgets:

    d = argmin MSE(e(x_f, [d; c]), e0(x_f, c))                                     x_f a noisy sample of the target
    L = MSE(e(x, [d; c]), e0(x, "") - eta (e0(x, c) - e0(x, ""))) + w MSE(e(y, r), e0(y, r))

x and y are latents that the student draws for c and r, up to one random step of the sampler. The first updates have no
attack. The paper trains the text encoder; the net trains here, which it also tries. UNVERIFIED: the images on which the
published attack predicts (its gradients add up over its steps, which is not reproduced). A prompt that leaves no room
for the words is not attacked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.parts.words import Slots
from sculpt_dist.config.checks import normal
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import Losses, TextCond
from sculpt_dist.data.streams import StreamSpec
from sculpt_dist.maths.losses import mse, mse_each, negative_guidance
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.base import Setup, Step, matrices

NO_IDS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Config:
    """The options of adv_unlearn."""

    name: str = "adv_unlearn"
    """Name of this method."""
    words: int = 1
    """Soft words before the prompt."""
    attack_steps: int = 30
    """Steps of the attack before an update."""
    attack_lr: float = 1e-3
    """Learning rate of the attack."""
    unattacked: float = 0.2
    """Share of the updates, the first ones, without attack."""
    eta: float = 1.0
    """Strength of the negative guidance."""
    guidance: float = 3.0
    """Guidance scale with which the student draws its latents."""
    sampler_steps: int = 50
    """Sampler steps of these latents."""
    retain: list[str] = field(
        default_factory=lambda: "bicycle, train, bench, bird, horse, umbrella, bottle, pizza, chair, clock".split(", ")
    )
    """Concepts to retain, other than those of the run, put into the concept's templates: for a style, name styles."""
    retain_weight: float = 0.3
    """Weight of retaining, w."""
    trains: str = "all"
    """Group of parameters that trains."""


class Method(Base):
    """Trains one group's matrices; needs samples of the target alone."""

    def __init__(
        self, config: Config, slots: Mapping[str, Slots] = {}, kept: Sequence[str] = (), ids: Tensor = NO_IDS
    ) -> None:
        """`slots`: the target's prompts that have room; `kept`: prompts to retain; `ids`: the vocabulary's, [V]."""
        for option in ("words", "attack_steps", "sampler_steps"):
            if getattr(config, option) < 1:
                raise ConfigError(f"method.{option}={getattr(config, option)}: must be at least 1")
        if not config.retain:
            raise ConfigError("method.retain is empty: name concepts to retain")
        if not 0 <= config.unattacked <= 1:
            raise ConfigError(f"method.unattacked={config.unattacked}: must be from 0 to 1")
        self.config, self.slots, self.kept, self.ids = config, slots, kept, ids

    def prepare(self, setup: Setup) -> Method:
        words, slots, full = setup.backbone.words, {}, ConfigError("there is no prompt")
        for prompt in dict.fromkeys(setup.prompts.target):
            try:
                slots[prompt] = words.open(prompt, self.config.words)
            except ConfigError as error:
                full = error
        if not slots:
            raise ConfigError(f"method.words={self.config.words}: {full}")
        taken = {normal(name) for concept in setup.concepts for name in (concept.target, concept.superclass or "")}
        names = [name for name in self.config.retain if normal(name) not in taken]
        if not names:
            raise ConfigError(f"method.retain={list(self.config.retain)}: all of them are concepts of the run")
        kept = setup.prompts.of(names)
        setup.backbone.embed(kept)
        return Method(self.config, slots, kept, words.ids())

    def streams(self) -> Sequence[StreamSpec]:
        return (StreamSpec("target"),)

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        return matrices(groups, self.config.trains)

    def saliency(self, step: Step) -> Losses:
        return self.losses(step)

    def losses(self, step: Step) -> Losses:
        config, cond = self.config, step.batch.target.cond
        empty_cond, index = step.empty(len(cond)), int(step.rng.shared("index") * config.sampler_steps)
        prompts = [self.kept[i] for i in step.rng.choice("retained", len(self.kept))]
        retained = step.backbone.embed(prompts)
        steps, guidance = config.sampler_steps, config.guidance
        y, _ = step.fresh_latents(index, steps, guidance, prompts, retained, "retained")
        x, time = step.fresh_latents(index, steps, guidance, step.batch.target.prompts, cond)
        empty, with_prompt, keeps = step.frozen("teacher").all(
            [(x, time, empty_cond), (x, time, cond), (y, time, retained)]
        )
        attacked = self._attacked(step) if step.progress >= config.unattacked else cond
        forgot, kept = step.student.all([(x, time, attacked), (y, time, retained)])
        return Losses(
            {
                "forget": mse(forgot, negative_guidance(empty, with_prompt, config.eta)),
                "retain": config.retain_weight * mse(kept, keeps),
            }
        )

    def _attacked(self, step: Step) -> TextCond:
        """The target's condition with the words that bring the concept back best, where there is room for them."""
        target, config = step.batch.target, self.config
        others = next(iter(self.slots.values()))  # attacked in vain, so that all ranks run the net as often
        slots = [self.slots.get(prompt, others) for prompt in target.prompts]
        first = torch.tensor([step.rng.choice(f"word {k}", len(self.ids)) for k in range(config.words)]).T
        drawn = step.backbone.words.vectors(self.ids[first])  # [B, words, width] for each text encoder
        vectors = [one.float().requires_grad_() for one in drawn]
        optimizer = torch.optim.Adam(vectors, lr=config.attack_lr)
        for number in range(config.attack_steps):
            time = step.backbone.sample_time(step.rng.uniform(f"attack time {number}"))  # [B]
            noisy, _ = step.corrupted(target, time, f"attack {number}")
            (wanted,) = step.frozen("teacher").all([(noisy, time, target.cond)])
            found = step.student.for_inputs(noisy, time, _embedded(step.backbone, slots, vectors, target.cond))
            gradients = torch.autograd.grad(mse_each(found, wanted).sum(), vectors)
            for vector, gradient in zip(vectors, gradients):
                vector.grad = gradient
            optimizer.step()
        with torch.no_grad():
            attacked = _embedded(step.backbone, slots, vectors, target.cond)
        has_room = torch.tensor([prompt in self.slots for prompt in target.prompts], device=target.latents.device)
        return attacked.where(has_room, target.cond)


def _embedded(backbone: Backbone, slots: Sequence[Slots], vectors: Sequence[Tensor], plain: TextCond) -> TextCond:
    """The conditions [B, ...] of prompts with these vectors [B, words, width] in their places, with gradient."""
    parts = [backbone.words.embed(slot, [each[i : i + 1] for each in vectors]) for i, slot in enumerate(slots)]
    return replace(TextCond.cat(parts), size_ids=plain.size_ids)
