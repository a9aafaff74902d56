"""No attack: the prompt and its own seed. What succeeds here is the pre-ASR, over which every attack is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sculpt_dist.attacks.base import Attack as Base
from sculpt_dist.attacks.base import Attempt, Case
from sculpt_dist.attacks.base import NoOptions as Config
from sculpt_dist.attacks.parts.victim import Victim

__all__ = ["Attack", "Config"]


class Attack(Base):
    def attempts(self, victim: Victim, cases: Sequence[Case]) -> Iterator[Attempt]:
        for place, case in enumerate(cases):
            yield Attempt(place, victim.model.draw(case))
