"""Scores of a model: images of every object in every style by fixed seeds, recognised, counted, with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.config.load import normal
from sculpt_dist.config.schema import Concept, RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import write_atomically
from sculpt_dist.core.progress import progress
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.request import StopRequest
from sculpt_dist.evaluation.classifiers.base import Classifier, load_classifier
from sculpt_dist.evaluation.metrics.images import image_metrics
from sculpt_dist.evaluation.requests import ImageRequest, World, as_batches, evaluated_world, image_requests
from sculpt_dist.maths.scores import Answers, Target, accuracy_by, bootstrap_intervals, unlearning_scores


def check_evaluation(config: RunConfig) -> None:
    """Find out before training what evaluation would stumble over. Raises ConfigError or ModelError."""
    world = evaluated_world(config)
    image_requests(config, world)
    judge = load_classifier(config.evaluate.classifier, world.objects, world.styles)
    style = next((concept.target for concept in config.concepts if concept.kind == "style"), None)
    if style is not None and not judge.styles:
        raise ConfigError(
            f"evaluate.classifier={config.evaluate.classifier}: knows no styles, so it cannot tell whether {style!r} is forgotten; "
            "choose another, or evaluate.enabled=false"
        )
    image_metrics(config.evaluate, 1, 0)


def check_prompts(config: RunConfig, backbone: Backbone) -> None:
    """Raises ConfigError when a prompt of the evaluation is too long for the text encoders."""
    backbone.tokenized(
        list(dict.fromkeys(request.prompt for request in image_requests(config, evaluated_world(config)))),
        negative=False,
    )


def score_targets(concepts: Sequence[Concept], world: World) -> list[Target]:
    """The concepts as indices into the world."""
    names = {"object": [normal(name) for name in world.objects], "style": [normal(name) for name in world.styles]}
    members = {normal(name): those for name, those in world.members.items()}
    targets = []
    for concept in concepts:
        siblings = members.get(normal(concept.superclass or ""), ()) if concept.kind == "object" else ()
        index = names[concept.kind].index(normal(concept.target))
        others = tuple(names["object"].index(normal(name)) for name in siblings if normal(name) in names["object"])
        targets.append(Target(concept.kind, index, tuple(i for i in others if i != index)))
    return targets


def evaluate(
    config: RunConfig,
    backbone: Backbone,
    net: nn.Module,
    group: Group,
    folder: Path,
    concepts: Sequence[Concept],
    label: str,
    stop: StopRequest | None,
) -> dict[str, Any]:
    """Draw, recognise and score; writes `folder`/{scores,answers}.json and the first image of each pair; returns the scores.

    `concepts` are those that should be forgotten by now. Each rank draws every so-many-th batch; as a sharded net needs all ranks
    in every forward, a rank without a batch of its own draws one along and discards it.
    """
    world = evaluated_world(config)
    classifier = load_classifier(config.evaluate.classifier, world.objects, world.styles)
    size = config.evaluate.batch
    batches = as_batches(image_requests(config, world), size)
    if group.is_first:
        (folder / "images").mkdir(parents=True, exist_ok=True)
    group.barrier()
    seen: list[tuple[int, list[int], list[int] | None]] = []
    rounds = range((len(batches) + group.size - 1) // group.size)
    capacity = len(rounds) * size
    metrics = image_metrics(config.evaluate, capacity * group.size, capacity * group.rank)
    for turn in progress(rounds, f"evaluate {label}", group.is_first):
        if stop is not None:
            stop.check(f"the evaluation {label}")
        number = turn * group.size + group.rank
        batch = batches[min(number, len(batches) - 1)]
        with backbone.temporary_embeddings() if batch[0].listed else nullcontext():
            images = draw(config, backbone, net, batch)  # uint8 [B, 3, h, w]
        if number < len(batches):
            if batch[0].judged:
                seen.append((number, *_recognise(classifier, images)))
            _keep_shown(folder, batch, images)
            counted = [i for i, request in enumerate(batch) if _is_counted(config, request)]
            for metric in metrics if counted else ():
                metric.update(images[counted], [batch[i].prompt for i in counted])
    scores = None
    everything = group.to_all(seen)
    extra: dict[str, float] = {}
    for metric in metrics:
        extra |= metric.result({name: group.sum(total.to(group.device)) for name, total in metric.state().items()})
    if group.is_first:
        judged = [request for batch in batches for request in batch if request.judged]
        answers = _answers(judged, [entry for rank in everything for entry in rank])
        scores = _scores(config, world, judged, answers, concepts)
        scores["plain"]["extra"] = extra
        plain = _part(answers, np.array([not request.paraphrased for request in judged]))
        write_atomically(folder / "answers.json", json.dumps(answers_as_lists(plain, world)).encode())
        write_atomically(folder / "scores.json", json.dumps(scores, indent=1).encode())
    return group.from_first(scores)


def draw(config: RunConfig, backbone: Backbone, net: nn.Module, batch: Sequence[ImageRequest]) -> Tensor:
    """Images of these asks, which share one guidance, uint8 [B, 3, h, w]."""
    noise = torch.stack(
        [
            torch.randn(*backbone.latent_shape, generator=torch.Generator().manual_seed(request.seed))
            for request in batch
        ]
    )
    cond, negative = (
        backbone.embed([request.prompt for request in batch]),
        backbone.embed([""] * len(batch), negative=True),
    )
    settings = config.evaluate
    latents = backbone.sample(
        backbone.denoiser(net), noise.to(backbone.device), cond, negative, settings.steps, batch[0].guidance
    )
    return backbone.decode(latents)


def _is_counted(config: RunConfig, request: ImageRequest) -> bool:
    """Whether an image counts for FID, KID and CLIPScore: those of the prompts to retain, or where there are none all plain ones."""
    return not request.judged if config.evaluate.retain_prompts else not request.paraphrased


def _recognise(classifier: Classifier, images: Tensor) -> tuple[list[int], list[int] | None]:
    verdict = classifier.classify(images)
    return verdict.objects.tolist(), None if verdict.styles is None else verdict.styles.tolist()


def _keep_shown(folder: Path, batch: Sequence[ImageRequest], images: Tensor) -> None:
    from PIL import Image

    for request, image in zip(batch, images):
        if request.shown:
            Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(folder / "images" / request.shown)


def _answers(wanted: Sequence[ImageRequest], seen: Sequence[tuple[int, list[int], list[int] | None]]) -> Answers:
    ordered = sorted(seen)
    styles = [style for _, _, found in ordered if found is not None for style in found]
    return Answers(
        prompt=np.array([request.prompt_id for request in wanted]),
        object_asked=np.array([request.object for request in wanted]),
        style_asked=np.array([request.style for request in wanted]),
        object_seen=np.array([name for _, found, _ in ordered for name in found]),
        style_seen=np.array(styles) if len(styles) == len(wanted) else None,
    )


def answers_as_lists(answers: Answers, world: World) -> dict[str, Any]:
    """Every image's answer with the names that the indices mean, for scores over several runs (see compare.py)."""
    columns = {f.name: getattr(answers, f.name) for f in fields(answers)}
    return {"objects": world.objects, "styles": world.styles} | {
        name: None if column is None else column.tolist() for name, column in columns.items()
    }


def _part(answers: Answers, chosen: np.ndarray) -> Answers:
    return Answers(
        answers.prompt[chosen],
        answers.object_asked[chosen],
        answers.style_asked[chosen],
        answers.object_seen[chosen],
        None if answers.style_seen is None else answers.style_seen[chosen],
    )


def _scores(
    config: RunConfig, world: World, wanted: Sequence[ImageRequest], answers: Answers, concepts: Sequence[Concept]
) -> dict[str, Any]:
    paraphrased = np.array([request.paraphrased for request in wanted])
    parts = {"plain": ~paraphrased, "paraphrased": paraphrased}
    return {
        name: _score_part(config, world, _part(answers, chosen), concepts) if chosen.any() else None
        for name, chosen in parts.items()
    }


def _score_part(config: RunConfig, world: World, answers: Answers, concepts: Sequence[Concept]) -> dict[str, Any]:
    forgotten = score_targets(concepts, world)
    scores: dict[str, Any] = dict(unlearning_scores(answers, forgotten))
    intervals = bootstrap_intervals(answers, forgotten, config.evaluate.bootstrap)
    scores |= {f"{name}_ci95": interval and list(interval) for name, interval in intervals.items()}
    seen_right = answers.object_seen == answers.object_asked
    scores["objects"] = accuracy_by(answers.object_asked, seen_right, world.objects)
    scores["styles"] = {}
    if answers.style_seen is not None:
        scores["styles"] = accuracy_by(answers.style_asked, answers.style_seen == answers.style_asked, world.styles)
    scores["targets"] = {}
    of_any = np.zeros(len(answers.prompt), bool)
    for concept, target in zip(config.concepts, score_targets(config.concepts, world)):
        alone = unlearning_scores(answers, [target])
        mine, accuracy = _asked_for(answers, target), None if alone["UA"] is None else 1 - alone["UA"]
        seen = None if accuracy is None else round(accuracy * mine.sum())
        scores["targets"][concept.target] = {
            "accuracy": accuracy,
            "UA": alone["UA"],
            "SA": alone["SA"],
            "seen": seen,
            "images": int(mine.sum()),
        }
    for target in forgotten:
        of_any |= _asked_for(answers, target)
    scores["images"] = {"target": int(of_any.sum()), "other": int((~of_any).sum())}
    return scores


def _asked_for(answers: Answers, target: Target) -> np.ndarray:  # [N] bool
    return (answers.object_asked if target.kind == "object" else answers.style_asked) == target.index
