"""From a concept's templates, or the user's list, to the prompts of its streams. Plain strings; no model."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sculpt_dist.config.load import normal
from sculpt_dist.config.schema import Concept, PrepareConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.data.prompt_files import read_prompts


@dataclass(frozen=True)
class ConceptPrompts:
    """The prompts of one concept; sample i of a stream uses prompt i modulo their number."""

    target: tuple[str, ...]  # template by template, or whole prompts from a file
    superclass: tuple[str, ...]  # at the same place the same with the superclass, or without the style
    negative: str  # what the superclass samples are led away from
    keep: tuple[str, ...]
    templates: tuple[str, ...] = ()
    names: tuple[str, str | None] = ("", None)  # of the target and the superclass, as they stand in the prompts

    def of(self, names: Sequence[str]) -> tuple[str, ...]:
        """The prompts of other concepts of this kind, each by every template; names and templates both take turns from one to the next."""
        number, turn = len(self.templates), math.lcm(len(self.templates), max(1, len(names)))
        return tuple(
            fill(self.templates[i % number], concept=names[(i + i // turn) % len(names)])
            for i in range(number * len(names))
        )


def fill(template: str, **names: str | None) -> str:
    """Replace {name}; text in [square brackets] is dropped when a name inside it is None.

    >>> fill("a photo of a {object}[ in {style} style]", object="cat", style=None)
    'a photo of a cat'
    """

    def optional(match: re.Match[str]) -> str:
        return "" if any(f"{{{name}}}" in match[1] and value is None for name, value in names.items()) else match[1]

    text = re.sub(r"\[([^\]]*)\]", optional, template)
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value or "")
    return " ".join(text.split())


def concept_prompts(concept: Concept, prepare: PrepareConfig) -> ConceptPrompts:
    """The prompts of a concept from its own templates, or from those of its kind; those of the target from a file, where one is named.

    Raises ConfigError when a style-free prompt would be empty or broken off, and for a file that cannot be read.
    """
    defaults = prepare.prompts
    templates: Sequence[str] = concept.prompts or (defaults.object if concept.kind == "object" else defaults.style)
    targets = tuple(fill(template, concept=concept.target) for template in templates)
    superclasses = tuple(fill(template, concept=concept.superclass) for template in templates)
    for template, prompt in zip(templates, superclasses):
        if not prompt or (concept.superclass is None and "{concept}" in re.sub(r"\[[^\]]*\]", "", template)):
            raise ConfigError(
                f"the prompt {template!r} without {concept.target!r} would be {prompt!r}: put what goes with the style into brackets, as "
                "in 'a photo[ in {concept} style]', or name a superclass"
            )
    prompts = ConceptPrompts(
        target=targets,
        superclass=superclasses,
        negative=targets[0],
        keep=tuple(fill(template, concept=kept) for template in templates for kept in concept.keep),
        templates=tuple(templates),
        names=(" ".join(concept.target.split()), " ".join((concept.superclass or "").split()) or None),
    )
    files = {normal(name): file for name, file in defaults.files.items()}
    file = files.get(normal(concept.target))
    return prompts if file is None else with_whole_prompts(prompts, concept, file, prepare.samples)


def naming(name: str) -> re.Pattern[str]:
    """What finds a concept's name in a prompt: as a word of its own, in any case."""
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)


def with_whole_prompts(prompts: ConceptPrompts, concept: Concept, file: str, most: int) -> ConceptPrompts:
    """The target's prompts as they stand in a file, at most the first `most`: each of them costs an embedding.

    Where a prompt names the target, its counterpart names the superclass there; where not, it is a template's prompt of the superclass.
    """
    listed = read_prompts(file)
    if len(listed) > most:
        warnings.warn(
            f"{file}: holds {len(listed)} prompts; prepare.samples={most}, so the first {most} are used", stacklevel=2
        )
    targets = tuple(line.prompt for line in listed[:most])
    name = naming(prompts.names[0])

    def counterpart(place: int, prompt: str) -> str:
        if concept.superclass is None or not name.search(prompt):
            return prompts.superclass[place % len(prompts.superclass)]
        return name.sub(lambda _: concept.superclass or "", prompt)

    return replace(
        prompts, target=targets, superclass=tuple(counterpart(i, prompt) for i, prompt in enumerate(targets))
    )
