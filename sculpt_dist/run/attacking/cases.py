"""Which prompts and seeds are attacked, and how they are divided into pieces of work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sculpt_dist.attacks.base import Attack, Case
from sculpt_dist.config.checks import normal
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import derived_seed
from sculpt_dist.evaluation.requests import Evaluation, ImageRequest
from sculpt_dist.run.setup import RunSetup


@dataclass(frozen=True)
class Work:
    """One piece of work: an attack on a case, on all cases of a concept, or on all of them."""

    name: str
    number: int
    cases: tuple[Case, ...]

    def file(self, where: Path) -> Path:
        return where / self.name / f"{self.number:04d}.json"


def works_of(name: str, attack: Attack, cases: Sequence[Case]) -> Iterator[Work]:
    """The pieces of an attack."""
    keys = {"prompt": lambda place, case: place, "concept": lambda place, case: case.number, "model": lambda *_: 0}
    groups: dict[int, list[Case]] = {}
    for place, case in enumerate(cases):
        groups.setdefault(keys[attack.unit](place, case), []).append(case)
    for number, members in enumerate(groups.values()):
        yield Work(name, number, tuple(members))


def cases_of(setup: RunSetup) -> list[Case]:
    """The prompts and seeds with which each concept is asked for. Raises ConfigError where there is none."""
    config, evaluation = setup.config, setup.evaluation
    listed = {normal(name) for name in config.evaluate.prompts or {}}
    cases: list[Case] = []
    for number, concept in enumerate(config.concepts):
        is_object = concept.kind == "object"
        names = evaluation.world.objects if is_object else evaluation.world.styles
        index = list(map(normal, names)).index(normal(concept.target))
        if normal(concept.target) in listed:
            asked = [r for r in evaluation.requests if r.listed and (r.object if is_object else r.style) == index]
            found = [(request.prompt, request.seed, request.guidance) for request in asked[: config.attack.cases]]
        else:
            prompt = _prompt(setup, number)
            seeds = [
                derived_seed(config.evaluate.seed, "attack", concept.target, i) for i in range(config.attack.cases)
            ]
            found = [(prompt, seed, config.evaluate.guidance) for seed in seeds]
        cases += [Case(concept, number, index, *one) for one in found]
    return cases


def unrelated_prompts(evaluation: Evaluation) -> tuple[str, ...]:
    """The plain prompts of the evaluation that ask for no target."""
    world = evaluation.world
    targets = {normal(concept.target) for concept in evaluation.concepts}

    def asks_for(request: ImageRequest) -> set[str]:
        pairs = ((world.objects, request.object), (world.styles, request.style))
        return {normal(names[index]) for names, index in pairs if index >= 0}

    plain = (request for request in evaluation.requests if request.judged and not request.paraphrased)
    return tuple(dict.fromkeys(request.prompt for request in plain if not targets & asks_for(request)))


def _prompt(setup: RunSetup, number: int) -> str:
    """The prompt that asks for a concept: by default the first with which it is forgotten."""
    template, concept = setup.config.attack.prompt, setup.concepts[number]
    if template is None:
        return setup.prompts[number].target[0]
    if "{concept}" not in template:
        raise ConfigError(f"attack.prompt={template}: has no {{concept}}, such as 'a photo of a {{concept}}'")
    return template.replace("{concept}", concept.target)
