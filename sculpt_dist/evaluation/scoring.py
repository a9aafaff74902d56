"""From verdicts to scores: UA, SA, IRA and CRA with bootstrap intervals, and the accuracy of each object and style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from sculpt_dist.config.checks import normal
from sculpt_dist.config.schema import Concept
from sculpt_dist.evaluation.requests import EvaluatedWorld, Evaluation, ImageRequest
from sculpt_dist.maths.accuracy import Answers, Target, accuracy_by, bootstrap_intervals, unlearning_scores

BatchVerdict = tuple[int, list[int], list[int] | None]  # number of the batch, objects seen, styles seen


def score_targets(concepts: Sequence[Concept], world: EvaluatedWorld) -> list[Target]:
    """The concepts as indices into the world."""
    places = {"object": _places(world.objects), "style": _places(world.styles)}
    members = {normal(name): of_superclass for name, of_superclass in world.members.items()}
    targets = []
    for concept in concepts:
        siblings = members.get(normal(concept.superclass or ""), ()) if concept.kind == "object" else ()
        index = places[concept.kind][normal(concept.target)]
        others = tuple(places["object"][normal(name)] for name in siblings if normal(name) in places["object"])
        targets.append(Target(concept.kind, index, tuple(i for i in others if i != index)))
    return targets


def held_objects(world: EvaluatedWorld) -> list[int]:
    """The objects that training held, as indices into the world."""
    return [i for i, name in enumerate(world.objects) if name in world.held]


def _places(names: Sequence[str]) -> dict[str, int]:
    """Each name's first place."""
    return {normal(name): place for place, name in reversed(list(enumerate(names)))}


def collect_answers(requests: Sequence[ImageRequest], verdicts: Sequence[BatchVerdict]) -> Answers:
    """What each judged image should show and what the classifier saw; verdicts may come in any order of batches."""
    ordered = sorted(verdicts)
    styles = [style for _, _, seen in ordered if seen is not None for style in seen]
    return Answers(
        prompt=np.array([request.prompt_id for request in requests]),
        object_asked=np.array([request.object for request in requests]),
        style_asked=np.array([request.style for request in requests]),
        object_seen=np.array([name for _, seen, _ in ordered for name in seen]),
        style_seen=np.array(styles) if len(styles) == len(requests) else None,
    )


def select_answers(answers: Answers, chosen: np.ndarray) -> Answers:
    """The answers of the images where `chosen` [N] is True."""
    return Answers(
        answers.prompt[chosen],
        answers.object_asked[chosen],
        answers.style_asked[chosen],
        answers.object_seen[chosen],
        None if answers.style_seen is None else answers.style_seen[chosen],
    )


def answers_as_lists(answers: Answers, world: EvaluatedWorld) -> dict[str, Any]:
    """The answers of all images, and the names behind their indices; comparisons compute scores over several runs."""
    columns = {f.name: getattr(answers, f.name) for f in fields(answers)}
    return {"objects": world.objects, "styles": world.styles} | {
        name: None if column is None else column.tolist() for name, column in columns.items()
    }


def compute_scores(
    evaluation: Evaluation, requests: Sequence[ImageRequest], answers: Answers, forgotten: Sequence[Concept]
) -> dict[str, Any]:
    """The content of scores.json: `plain` and `paraphrased` scores, each None when it has no images.

    `requests` and `answers` describe the same judged images; `forgotten` are the concepts that count as targets.
    """
    paraphrased = np.array([request.paraphrased for request in requests])
    parts = {"plain": ~paraphrased, "paraphrased": paraphrased}
    return {
        name: _score_part(evaluation, select_answers(answers, chosen), forgotten) if chosen.any() else None
        for name, chosen in parts.items()
    }


def _score_part(evaluation: Evaluation, answers: Answers, forgotten: Sequence[Concept]) -> dict[str, Any]:
    world, targets = evaluation.world, score_targets(forgotten, evaluation.world)
    held = held_objects(world)
    scores: dict[str, Any] = dict(unlearning_scores(answers, targets, held=held))
    intervals = bootstrap_intervals(answers, targets, evaluation.settings.bootstrap, held=held)
    scores |= {f"{name}_ci95": interval and list(interval) for name, interval in intervals.items()}
    object_is_right = answers.object_seen == answers.object_asked
    scores["objects"] = accuracy_by(answers.object_asked, object_is_right, world.objects)
    scores["styles"] = {}
    if answers.style_seen is not None:
        scores["styles"] = accuracy_by(answers.style_asked, answers.style_seen == answers.style_asked, world.styles)
    scores["targets"] = {
        concept.target: _score_target(answers, target)
        for concept, target in zip(evaluation.concepts, score_targets(evaluation.concepts, world))
    }
    of_a_target = np.zeros(len(answers.prompt), bool)
    for target in targets:
        of_a_target |= _asks_for(answers, target)
    scores["images"] = {"target": int(of_a_target.sum()), "other": int((~of_a_target).sum())}
    return scores


def _score_target(answers: Answers, target: Target) -> dict[str, Any]:
    """UA and SA of one target alone, and in how many of its images the classifier still sees it."""
    alone = unlearning_scores(answers, [target])
    num_images = _asks_for(answers, target).sum()
    accuracy = None if alone["UA"] is None else 1 - alone["UA"]
    return {
        "accuracy": accuracy,
        "UA": alone["UA"],
        "SA": alone["SA"],
        "seen": None if accuracy is None else round(accuracy * num_images),
        "images": int(num_images),
    }


def _asks_for(answers: Answers, target: Target) -> np.ndarray:  # [N] bool
    return (answers.object_asked if target.kind == "object" else answers.style_asked) == target.index
