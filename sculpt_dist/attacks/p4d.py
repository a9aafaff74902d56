"""Prompting4Debugging: tokens for which the unlearned net predicts what the original one does (arXiv 2309.06135).

    min over N tokens  || e_0(z_t, prompt) - e_th(z_t, [tokens; prompt]) ||^2

The vectors are free; the forward pass takes the nearest token of each (by cosine, as PEZ does), and the gradient goes
straight through. Published (P4D-N): N = 16, 3,000 steps of AdamW with learning rate .1 and weight decay .1, judged
every 50. The tokens stand before the prompt, as in the code of UnlearnDiffAtk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from sculpt_dist.attacks.base import Attack as Base
from sculpt_dist.attacks.base import Attempt, Case
from sculpt_dist.attacks.parts.search import Question, as_found, nearest
from sculpt_dist.attacks.parts.victim import Victim


@dataclass(frozen=True)
class Config:
    """The options of p4d."""

    tokens: int = 3
    """Free tokens, N."""
    steps: int = 200
    """Updates."""
    every: int = 25
    """Updates between images that are judged."""
    lr: float = 0.1
    """Learning rate of AdamW."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""


PUBLISHED = {"tokens": 16, "steps": 3000, "every": 50}


class Attack(Base):
    may_be_zero = ("weight_decay",)
    stops = True
    needs_original = needs_gradient = True
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.slots = config.tokens

    def attempts(self, victim: Victim, cases: Sequence[Case]) -> Iterator[Attempt]:
        (case,) = cases
        config, model, rng = self.config, victim.model, victim.rng("p4d", case.seed)
        words = model.backbone.words
        slots, clean, cond = (
            words.open(case.prompt, config.tokens),
            victim.reference(case),
            victim.known.embed(case.prompt),
        )
        usable, tables = words.ids(), [table.float() for table in words.table()]
        known = normalize(torch.cat([table[usable.to(table.device)] for table in tables], -1), dim=-1)
        ids = usable[torch.randint(len(usable), (config.tokens,), generator=rng)]
        vectors = [table[ids.to(table.device)].clone().requires_grad_() for table in tables]
        optimizer = torch.optim.AdamW(vectors, config.lr, weight_decay=config.weight_decay)
        for step in range(1, config.steps + 1):
            time = model.backbone.sample_time(torch.rand(1, generator=rng))
            question = Question.at(victim, clean, time, rng)
            with torch.no_grad():
                goal = victim.known.predict(question.noisy, time, cond)
            ids = usable[nearest(torch.cat(vectors, -1).detach(), known).cpu()]  # one choice for all text encoders
            straight = [
                vector + (table[ids.to(table.device)] - vector).detach() for vector, table in zip(vectors, tables)
            ]
            optimizer.zero_grad()
            Question(question.noisy, time, goal).loss(
                victim, words.embed(slots, [one[None] for one in straight])
            ).backward()
            optimizer.step()
            if step % config.every == 0 or step == config.steps:
                image = model.draw(case, words.encode(slots, ids[None]))
                yield Attempt(0, image, found=as_found(victim, slots, ids, case))
