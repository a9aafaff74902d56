"""The prompts of a concept's streams, from templates or from the user's list. Plain strings, no model."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sculpt_dist.config.checks import normal
from sculpt_dist.config.schema import Concept, PrepareConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.data.prompt_files import read_prompts

UNSPACED = (  # scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, Japanese, Chinese
    "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)


@dataclass(frozen=True)
class ConceptPrompts:
    """The prompts of one concept; sample i of a stream uses prompt i modulo their number."""

    target: tuple[str, ...]
    """One prompt per template, or whole prompts from a file."""
    superclass: tuple[str, ...]
    """The counterpart of each target prompt: with the superclass in place of the target, or without the style."""
    negative: str
    """Negative prompt of the superclass samples."""
    keep: tuple[str, ...]
    """Prompts of the concepts to keep."""
    templates: tuple[str, ...] = ()
    names: tuple[str, str | None] = ("", None)
    """Names of the target and the superclass as they appear in the prompts."""

    def of(self, names: Sequence[str]) -> tuple[str, ...]:
        """The prompts of other concepts of this kind: every name with every template.

        Both the name and the template change from each prompt to the next, so that a few prompts cover many of both.
        """
        num, period = len(self.templates), math.lcm(len(self.templates), max(1, len(names)))
        return tuple(
            fill(self.templates[i % num], concept=names[(i + i // period) % len(names)])
            for i in range(num * len(names))
        )


def fill(template: str, **names: str | None) -> str:
    """Replace every {name}. Text in [square brackets] is dropped if a name inside it is None.

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
    """The prompts of a concept, from its own templates or those of its kind.

    The target's prompts come from a file if `prepare.prompts.files` names one. Raises ConfigError if a prompt without
    the style would be empty or incomplete, and for a file that cannot be read.
    """
    defaults = prepare.prompts
    templates: Sequence[str] = concept.prompts or (defaults.object if concept.kind == "object" else defaults.style)
    targets = tuple(fill(template, concept=concept.target) for template in templates)
    superclasses = tuple(fill(template, concept=concept.superclass) for template in templates)
    for template, prompt in zip(templates, superclasses):
        if not prompt or (concept.superclass is None and "{concept}" in re.sub(r"\[[^\]]*\]", "", template)):
            raise ConfigError(
                f"the prompt {template!r} without {concept.target!r} would be {prompt!r}: put the words that belong to "
                "the style into brackets, as in 'a photo[ in {concept} style]', or name a superclass"
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


def taking_turns(of_concepts: Sequence[ConceptPrompts], samples: int) -> ConceptPrompts:
    """The prompts of n concepts whose samples take turns: prompt k n + c is that of sample k of concept c.

    `samples`: of the largest source.
    """

    def in_turn(role: str) -> tuple[str, ...]:
        lists: list[tuple[str, ...]] = [getattr(prompts, role) for prompts in of_concepts]
        return tuple(prompts[k % len(prompts)] for k in range(samples) for prompts in lists)

    kept = dict.fromkeys(text for prompts in of_concepts for text in prompts.keep)
    return ConceptPrompts(in_turn("target"), in_turn("superclass"), "", tuple(kept), of_concepts[0].templates)


def naming(name: str) -> re.Pattern[str]:
    """A pattern that finds a concept's name in a prompt, as a whole word in upper or lower case.

    In scripts without spaces, such as Chinese, Japanese and Thai, any neighbour may stand beside it.
    """
    before, after = rf"(?<![^\W{UNSPACED}])", rf"(?![^\W{UNSPACED}])"
    first, last = (
        "" if re.match(f"[{UNSPACED}]", edge) else bound for edge, bound in zip((name[:1], name[-1:]), (before, after))
    )
    return re.compile(f"{first}{re.escape(name)}{last}", re.IGNORECASE)


def with_whole_prompts(prompts: ConceptPrompts, concept: Concept, file: str, most: int) -> ConceptPrompts:
    """`prompts` with the target's prompts from a file: its first `most` at most, because each costs an embedding.

    The counterpart of a prompt names the superclass in place of the target. If the prompt does not name the target, its
    counterpart is one of the superclass's template prompts.
    """
    listed = read_prompts(file)
    if len(listed) > most:
        warnings.warn(
            f"{file}: contains {len(listed)} prompts; prepare.samples={most}, so only the first {most} are used",
            stacklevel=2,
        )
    targets = tuple(line.prompt for line in listed[:most])
    name = naming(prompts.names[0])

    unnamed = [prompt for prompt in targets if not name.search(prompt)]
    if unnamed and concept.superclass is not None:
        warnings.warn(
            f"{file}: {len(unnamed)} of {len(targets)} prompts do not name {concept.target!r}, such as {unnamed[0]!r}; "
            "their counterparts are those of the superclass's templates",
            stacklevel=2,
        )

    def counterpart(index: int, prompt: str) -> str:
        if concept.superclass is None or not name.search(prompt):
            return prompts.superclass[index % len(prompts.superclass)]
        return name.sub(lambda _: concept.superclass or "", prompt)

    return replace(
        prompts, target=targets, superclass=tuple(counterpart(i, prompt) for i, prompt in enumerate(targets))
    )
