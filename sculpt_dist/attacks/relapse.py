"""Relapse: does a concept come back while later ones are forgotten? It costs nothing: the stages of a run are scored.

For every target, how often the classifier sees it after the concept itself, after each later one, and at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sculpt_dist.attacks.base import Attack as Base
from sculpt_dist.attacks.base import Attempt, Case
from sculpt_dist.attacks.base import NoOptions as Config
from sculpt_dist.attacks.parts.victim import Victim
from sculpt_dist.core.files import read_object

__all__ = ["Attack", "Config"]


class Attack(Base):
    unit = "concept"
    needs_run = True

    def attempts(self, victim: Victim, cases: Sequence[Case]) -> Iterator[Attempt]:
        assert victim.run is not None, "the driver refuses such an attack where there is no run"
        case, seen = cases[0], {}
        for file in (victim.run / "evaluation").glob("after-*/scores.json"):
            scores = read_object(file, "remove its folder, and repeat the run", ("plain",))
            alone = scores["plain"]["targets"].get(case.concept.target)
            number = int(file.parent.name.removeprefix("after-"))
            if number >= case.number and alone is not None and alone["UA"] is not None:
                seen[number] = 1 - alone["UA"]
        if seen:
            yield Attempt(0, scores={"relapse_last": seen[max(seen)], "relapse_most": max(seen.values())})
