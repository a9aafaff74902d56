"""UnlearnDiffAtk: tokens before the prompt with which the unlearned net recognises the concept (arXiv 2310.11868).

    min over k tokens  || e - e_th(z_t(x*), t, [tokens; prompt]) ||^2,    x* drawn by the original model

The tokens are relaxed to distributions over the vocabulary, [k, V], uniform at first. The forward pass draws a token
from each and the gradient goes straight through, clipped to [-1, 1] (hardtanh); Adam; after each step the distributions
are projected onto the simplex. Times go from little noise to much, so many steps at each, and then the likeliest tokens
are drawn and judged: the first success ends the attack. Published: 50 times x 40 steps, Adam .01 with weight decay .1,
three tokens for objects and styles, five for nudity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt_dist.attacks.base import Attack as Base
from sculpt_dist.attacks.base import Attempt, Case
from sculpt_dist.attacks.parts.search import Question, as_found
from sculpt_dist.attacks.parts.victim import Victim, times


@dataclass(frozen=True)
class Config:
    """The options of unlearn_diff_atk."""

    tokens: int = 3
    """Tokens before the prompt, k: published 3 for objects and styles, 5 for nudity."""
    times: int = 20
    """Times at which it optimises, and images that it draws at most."""
    steps: int = 10
    """Updates at each time."""
    lr: float = 0.01
    """Learning rate of Adam."""
    weight_decay: float = 0.1
    """Weight decay of Adam."""


PUBLISHED = {"times": 50, "steps": 40}


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
        config, words = self.config, victim.model.backbone.words
        slots, clean = words.open(case.prompt, config.tokens), victim.reference(case)
        usable = words.ids()  # [V]
        tables = [table[usable.to(table.device)].float() for table in words.table()]
        weights = torch.full((config.tokens, len(usable)), 1 / len(usable), device=victim.device, requires_grad=True)
        optimizer = torch.optim.Adam([weights], config.lr, weight_decay=config.weight_decay)
        rng = victim.rng("unlearn_diff_atk", case.seed)
        for time in times(victim.model, config.times):
            for _ in range(config.steps):
                drawn = torch.multinomial(weights.detach().cpu(), 1, generator=rng)[:, 0].to(weights.device)
                chosen = _StraightThrough.apply(weights, drawn)  # [k, V]
                cond = words.embed(slots, [(chosen @ table)[None] for table in tables])
                optimizer.zero_grad()
                Question.at(victim, clean, time, rng).loss(victim, cond).backward()
                optimizer.step()
                with torch.no_grad():
                    weights.copy_(onto_simplex(weights))
            ids = usable[weights.detach().argmax(1).cpu()]
            image = victim.model.draw(case, words.encode(slots, ids[None]))
            yield Attempt(0, image, found=as_found(victim, slots, ids, case))


class _StraightThrough(torch.autograd.Function):
    """One-hot rows forward; backward the gradient goes to the distributions, clipped to [-1, 1]."""

    @staticmethod
    def forward(ctx: object, weights: Tensor, drawn: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(drawn, weights.shape[1]).to(weights)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.nn.functional.hardtanh(grads[0]), None


def onto_simplex(rows: Tensor) -> Tensor:
    """The nearest points with entries in [0, 1] that sum to 1, row by row of [k, V] (Duchi et al., ICML 2008)."""
    ordered = rows.sort(1, descending=True).values
    excess = (ordered.cumsum(1) - 1) / torch.arange(1, rows.shape[1] + 1, device=rows.device)
    count = (ordered > excess).sum(1, keepdim=True)
    return (rows - excess.gather(1, count - 1)).clamp(min=0)
