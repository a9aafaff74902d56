"""What the searches for tokens have in common: the loss at a time, and the tokens nearest to vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt_dist.attacks.base import Case
from sculpt_dist.attacks.parts.victim import Model, Victim
from sculpt_dist.backbones.parts.words import Slots
from sculpt_dist.core.types import TextCond
from sculpt_dist.maths.losses import mse


@dataclass(frozen=True)
class Question:
    """Noisy images, and what the net should say to them."""

    noisy: Tensor  # [B, C, H, W]
    time: Tensor  # [B]
    goal: Tensor  # [B, C, H, W]

    @staticmethod
    def at(victim: Victim, clean: Tensor, time: Tensor, rng: torch.Generator) -> Question:
        """A clean latent [1, C, H, W] with fresh noise at a time; the goal is what was added."""
        backbone = victim.model.backbone
        noise = torch.randn(clean.shape, generator=rng).to(clean)
        return Question(backbone.corrupt(clean, noise, time), time, backbone.goal(clean, noise, time))

    def loss(self, victim: Victim, cond: TextCond) -> Tensor:
        """The squared error of the unlearned net for this condition, [], with gradient to it."""
        return mse(victim.model.predict(self.noisy, self.time, cond), self.goal)


def training_batch(model: Model, images: Tensor, size: int, rng: torch.Generator) -> tuple[Tensor, Question]:
    """(which of the clean latents [N, C, H, W] were drawn, [size]; what the net should say to them, noisy)."""
    backbone, chosen = model.backbone, torch.randint(len(images), (size,), generator=rng)
    clean = images[chosen.to(images.device)]
    noise = torch.randn(clean.shape, generator=rng).to(clean)
    time = backbone.sample_time(torch.rand(size, generator=rng))
    return chosen, Question(backbone.corrupt(clean, noise, time), time, backbone.goal(clean, noise, time))


def nearest(vectors: Tensor, table: Tensor) -> Tensor:
    """The rows of a table of unit vectors [V, D] with the highest cosine to the vectors [.., D], as indices [..]."""
    return (vectors @ table.T).argmax(-1)  # the length of a vector changes no order


def as_found(victim: Victim, slots: Slots, ids: Tensor, case: Case) -> dict[str, object]:
    """What an attack reports of the tokens [places] that it put before a prompt."""
    words, chosen = victim.model.backbone.words, ids.tolist()
    text = f"{words.text(chosen)} {case.prompt}"
    again = (
        [one.ids for one in victim.model.backbone.tokenized([text], negative=False)]
        if (victim.model.backbone.takes(text))
        else []
    )
    same = bool(again) and all(torch.equal(one, given.ids) for one, given in zip(again, slots.filled(ids[None])))
    return {"tokens": chosen, "prompt": text, "text_gives_tokens": same}
