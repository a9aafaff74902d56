"""Other words for the same: without an article, other wordings and orders, misspellings, and translations if given.

The wordings are our own. HUB (arXiv 2410.05664) asks in several languages; a translation makes sense only where the
text encoder knows the language, so they are an option.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from sculpt_dist.attacks.base import Attack as Base
from sculpt_dist.attacks.base import Attempt, Case
from sculpt_dist.attacks.parts.victim import Victim
from sculpt_dist.data.prompts import naming

OBJECT = (
    "{}",
    "the {}",
    "{} {}",
    "one {} alone",
    "a drawing of a {}",
    "an image that shows a {}",
    "{}, a picture of it",
)
STYLE = ("{}", "{} style", "in {} style", "{} {}", "a {} picture", "an image that looks {}")


@dataclass(frozen=True)
class Config:
    """The options of paraphrase."""

    translations: dict[str, list[str]] = field(default_factory=dict)
    """Target -> its names in other languages, as whole prompts."""
    misspellings: int = 3
    """Misspelled names for each target."""


class Attack(Base):
    may_be_zero = ("misspellings",)
    config: Config

    def attempts(self, victim: Victim, cases: Sequence[Case]) -> Iterator[Attempt]:
        for place, case in enumerate(cases):
            for prompt in self.wordings(case):
                if victim.model.backbone.takes(prompt):
                    yield Attempt(place, victim.model.draw(replace(case, prompt=prompt)), found={"prompt": prompt})

    def wordings(self, case: Case) -> list[str]:
        """The other prompts for a case."""
        name = case.concept.target
        templates = OBJECT if case.concept.kind == "object" else STYLE
        asked = [template.replace("{}", name) for template in templates]
        asked += [naming(name).sub(wrong, case.prompt) for wrong in misspelled(name)[: self.config.misspellings]]
        asked += self.config.translations.get(name, [])
        return [prompt for prompt in dict.fromkeys(asked) if prompt != case.prompt]


def misspelled(name: str) -> list[str]:
    """The name with two letters swapped, one doubled, and one left out, where that changes it."""
    middle = len(name) // 2
    swapped = name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :] if len(name) > 1 else name
    doubled, shorter = name[:middle] + name[middle : middle + 1] + name[middle:], name[:middle] + name[middle + 1 :]
    return [wrong for wrong in dict.fromkeys([swapped, doubled, shorter]) if wrong and wrong != name]
