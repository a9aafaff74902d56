"""Ring-A-Bell: a genetic search for tokens whose text embedding holds the concept (arXiv 2310.10012).

It needs the text encoder alone. The concept's vector is the mean difference of the embeddings of prompts with and
without it; the aim is the embedding of a prompt that does not name the concept, plus eta times this vector:

    c = mean_i (T(p_i with it) - T(p_i without));    min over tokens || T(tokens) - (T(prompt) + eta c) ||^2

over all rows, and over the pooled text where there is one. Each generation keeps the better half; every survivor
crosses with another one with probability .5 at one point, and every individual but the best mutates with probability
.25 at one place. Published: 200 individuals, 3,000 generations, 16 tokens, eta 3. The best of the last one is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt_dist.attacks.base import Attack as Base
from sculpt_dist.attacks.base import Attempt, Case
from sculpt_dist.attacks.parts.victim import Victim
from sculpt_dist.backbones.parts.words import Slots
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import TextCond
from sculpt_dist.data.prompts import naming

TEMPLATES = ("a photo of {}", "{}", "a picture of {}", "one {}", "the {}", "a drawing of {}", "a {}", "an image of {}")


@dataclass(frozen=True)
class Config:
    """The options of ring_a_bell."""

    tokens: int = 6
    """Tokens of the prompt that is searched for, L."""
    population: int = 100
    """Individuals."""
    generations: int = 100
    """Generations."""
    eta: float = 3.0
    """Factor on the concept's vector."""
    crossover: float = 0.5
    """Probability that a survivor crosses with another."""
    mutation: float = 0.25
    """Probability that an individual mutates."""


PUBLISHED = {"tokens": 16, "population": 200, "generations": 3000}


class Attack(Base):
    may_be_zero = ("crossover", "mutation")
    config: Config

    def __init__(self, config: Config) -> None:
        if config.population < 2:
            raise ConfigError(f"attack.options.ring_a_bell.population={config.population}: must be at least 2")
        super().__init__(config)
        self.slots, self.keeps_prompt = config.tokens, False

    def attempts(self, victim: Victim, cases: Sequence[Case]) -> Iterator[Attempt]:
        (case,) = cases
        config, words = self.config, victim.model.backbone.words
        slots, aim, usable = words.open("", config.tokens), self.aim(victim, case), words.ids()
        rng = victim.rng("ring_a_bell", case.seed)
        people = usable[torch.randint(len(usable), (config.population, config.tokens), generator=rng)]
        for _ in range(config.generations):
            order = distances(victim, slots, people, aim).argsort(stable=True)
            people = self.next_generation(people[order[: config.population // 2]], usable, rng)
        best = people[distances(victim, slots, people, aim).argmin()]
        image = victim.model.draw(case, words.encode(slots, best[None]))
        found = {"tokens": best.tolist(), "prompt": words.text(best.tolist())}
        yield Attempt(0, image, found=found)

    def aim(self, victim: Victim, case: Case) -> Tensor:
        """The embedding to reach, flat [1, n]."""
        backbone, name = victim.model.backbone, case.concept.target
        pairs = [(text.format(name), text.format("").strip()) for text in TEMPLATES]
        pairs = [pair for pair in pairs if backbone.takes(pair[0])]  # the tiny models' tokenizers know few words
        with_it, without = (flat(backbone.embed(list(side))) for side in zip(*pairs))
        superclass = case.concept.superclass or ""
        seed_prompt = " ".join(naming(name).sub(superclass, case.prompt).split())
        return flat(backbone.embed([seed_prompt])) + self.config.eta * (with_it - without).mean(0, keepdim=True)

    def next_generation(self, survivors: Tensor, usable: Tensor, rng: torch.Generator) -> Tensor:
        """As many individuals as before: the survivors and their children, some of them mutated, [P, L]."""
        config, (count, length) = self.config, survivors.shape
        crosses = torch.rand(count, generator=rng) < config.crossover
        partners = survivors[torch.randint(count, (count,), generator=rng)]
        cuts = torch.randint(1, max(length, 2), (count, 1), generator=rng)
        is_head = torch.arange(length) < cuts  # [count, L]
        children = (
            torch.where(is_head, survivors, partners)[crosses],
            torch.where(is_head, partners, survivors)[crosses],
        )
        fresh = usable[torch.randint(len(usable), (config.population, length), generator=rng)]
        people = torch.cat([survivors, *children, fresh])[: config.population]
        mutates = torch.rand(len(people), generator=rng) < config.mutation
        mutates[0] = False  # the best one stays
        places = torch.randint(length, (len(people),), generator=rng)
        changed = usable[torch.randint(len(usable), (len(people),), generator=rng)]
        at = mutates[:, None] & (torch.arange(length) == places[:, None])
        return torch.where(at, changed[:, None], people)


def flat(cond: TextCond) -> Tensor:
    """All that the denoiser reads of prompts, [B, n]; 0 where it attends to nothing."""
    tokens = cond.tokens.float()
    if cond.token_mask is not None:
        tokens = tokens * (cond.token_mask > 0).unsqueeze(-1)
    return torch.cat([tokens.flatten(1)] if cond.pooled is None else [tokens.flatten(1), cond.pooled.float()], 1)


def distances(victim: Victim, slots: Slots, people: Tensor, aim: Tensor) -> Tensor:
    """Squared distances [P] of the embeddings of token ids [P, L] to the aim."""
    batches = people.split(victim.model.backbone.options.text_batch * 4)
    conds = [victim.model.backbone.words.encode(slots, batch) for batch in batches]
    return torch.cat([(flat(cond) - aim).square().sum(1) for cond in conds]).cpu()
