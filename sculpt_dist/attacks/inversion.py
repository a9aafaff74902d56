"""Concept inversion: a new word is learned for the concept on the unlearned model (arXiv 2308.01508).

    min over v  E || e - e_th(z_t, t, [.. v ..]) ||^2

on images of the concept, with the net and the text encoders frozen: textual inversion. One vector for each text encoder
(two for SDXL). Published: 5,000 steps, batch 4 x 4, learning rate 5e-3 times the batch. The images are drawn by the
original model with other seeds than the attack draws with afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt_dist.attacks.base import Attack as Base
from sculpt_dist.attacks.base import Attempt, Case
from sculpt_dist.attacks.parts.search import training_batch
from sculpt_dist.attacks.parts.victim import Victim
from sculpt_dist.core.types import TextCond
from sculpt_dist.data.prompts import naming


@dataclass(frozen=True)
class Config:
    """The options of inversion."""

    steps: int = 300
    """Updates of the vector."""
    batch: int = 8
    """Images of an update."""
    images: int = 16
    """Images of the concept, drawn by the original model."""
    lr: float = 0.03
    """Learning rate of Adam, constant."""
    tokens: int = 1
    """New words."""


PUBLISHED = {"steps": 5000, "batch": 16, "images": 25, "lr": 0.08}


class Attack(Base):
    unit = "concept"
    needs_original = needs_gradient = True
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.slots = config.tokens

    def attempts(self, victim: Victim, cases: Sequence[Case]) -> Iterator[Attempt]:
        vectors = self.learn(victim, cases[0])
        found = {f"vector_{number}": vector[0] for number, vector in enumerate(vectors)}
        for place, case in enumerate(cases):
            with torch.no_grad():
                cond = self.condition(victim, case, vectors)
            yield Attempt(place, victim.model.draw(case, cond), tensors=found if place == 0 else {})

    def learn(self, victim: Victim, case: Case) -> list[Tensor]:
        """The vectors for a case's concept, [1, tokens, width] for each text encoder."""
        model, config = victim.model, self.config
        images = victim.references(case, config.images)
        start = [table[model.backbone.words.ids()].float().mean(0) for table in model.backbone.words.table()]
        vectors = [mean.expand(1, config.tokens, -1).clone().requires_grad_() for mean in start]
        optimizer = torch.optim.Adam(vectors, config.lr)
        rng = victim.rng("inversion", case.concept.target)
        for _ in range(config.steps):
            _, question = training_batch(model, images, config.batch, rng)
            cond = self.condition(victim, case, vectors)
            optimizer.zero_grad()
            question.loss(victim, TextCond.cat([cond] * config.batch)).backward()
            optimizer.step()
        return [vector.detach() for vector in vectors]

    def condition(self, victim: Victim, case: Case, vectors: Sequence[Tensor]) -> TextCond:
        """The prompt with the new words in place of the concept's name, [1, ...]."""
        words = victim.model.backbone.words
        return words.embed(words.open(without_name(case), self.config.tokens), vectors)


def without_name(case: Case) -> str:
    """The case's prompt without the concept's name, so that nothing but the vector asks for it."""
    return " ".join(naming(case.concept.target).sub(" ", case.prompt).split())
