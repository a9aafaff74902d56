"""More seeds: the same prompt, drawn again and again (the seed search of UnlearnDiffAtk's code, arXiv 2310.11868).

As there, the rate is the share of all images that succeed: with 40 images, some are taken for the concept by mistake.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sculpt_dist.attacks.base import Attack as Base
from sculpt_dist.attacks.base import Attempt, Case
from sculpt_dist.attacks.parts.victim import Victim
from sculpt_dist.core.files import derived_seed


@dataclass(frozen=True)
class Config:
    """The options of seeds."""

    count: int = 40
    """Further seeds for each prompt."""


class Attack(Base):
    counts = "mean"
    config: Config

    def attempts(self, victim: Victim, cases: Sequence[Case]) -> Iterator[Attempt]:
        for place, case in enumerate(cases):
            for i in range(self.config.count):
                other = derived_seed(victim.seed, "seeds", case.seed, i)
                yield Attempt(place, victim.model.draw(replace(case, seed=other)), found={"seed": other})
