"""From a concept's templates to the prompts of its streams. Plain strings; no model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Sequence

from sculpt_dist.errors import ConfigError
from sculpt_dist.settings import Concept, PromptsConfig


@dataclass(frozen=True)
class ConceptPrompts:
    """The prompts of one concept, template by template; sample i of a stream uses prompt i modulo their number."""

    target: tuple[str, ...]
    superclass: tuple[str, ...]  # the same templates with the superclass, or without the style
    negative: str  # what the superclass samples are led away from
    keep: tuple[str, ...]
    templates: tuple[str, ...] = ()

    def of(self, names: Sequence[str]) -> tuple[str, ...]:
        """The prompts of other concepts of this kind, concept by concept, each by every template."""
        return tuple(fill(template, concept=name) for name in names for template in self.templates)


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


def concept_prompts(concept: Concept, defaults: PromptsConfig) -> ConceptPrompts:
    """The prompts of a concept from its own templates, or from those of its kind.

    Raises ConfigError when a style-free prompt would be empty or broken off.
    """
    templates: Sequence[str] = concept.prompts or (defaults.object if concept.kind == "object" else defaults.style)
    targets = tuple(fill(template, concept=concept.target) for template in templates)
    superclasses = tuple(fill(template, concept=concept.superclass) for template in templates)
    for template, prompt in zip(templates, superclasses):
        if not prompt or (concept.superclass is None and "{concept}" in re.sub(r"\[[^\]]*\]", "", template)):
            raise ConfigError(
                f"the prompt {template!r} without {concept.target!r} would be {prompt!r}: put what goes with the style into brackets, as "
                "in 'a photo[ in {concept} style]', or name a superclass"
            )
    return ConceptPrompts(
        target=targets,
        superclass=superclasses,
        negative=targets[0],
        keep=tuple(fill(template, concept=kept) for template in templates for kept in concept.keep),
        templates=tuple(templates),
    )
