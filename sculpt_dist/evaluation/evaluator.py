"""Evaluates a model: draws images from fixed seeds, has a classifier recognise them, and writes the scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sculpt_dist.config.schema import Concept, EvaluateConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import make_folder, text_sha256, write_atomically, write_record
from sculpt_dist.core.progress import progress
from sculpt_dist.evaluation.classifiers.base import Classifier, load_classifier
from sculpt_dist.evaluation.drawn_images import DrawnImages, file_names, images_csv
from sculpt_dist.evaluation.features import first_reference_features, shared_reference_features
from sculpt_dist.evaluation.metrics.base import Metric, build_metrics
from sculpt_dist.evaluation.requests import Evaluation, ImageRequest, as_batches
from sculpt_dist.evaluation.scoring import (
    BatchVerdict,
    answers_as_lists,
    collect_answers,
    compute_scores,
    select_answers,
)

if TYPE_CHECKING:
    from sculpt_dist.backbones.base import Backbone
    from sculpt_dist.engine.group import Group
    from sculpt_dist.engine.stopping.request import StopRequest


def check_evaluation(evaluation: Evaluation) -> None:
    """Detect before training what would make the evaluation fail. Raises ConfigError or ModelError."""
    settings = evaluation.settings
    _ = evaluation.requests  # reads the prompt files
    style = next((concept.target for concept in evaluation.concepts if concept.kind == "style"), None)
    keys = (f"evaluate.classifier={settings.classifier}", f"evaluate.witness={settings.witness}")
    for key, classifier in zip(keys, load_classifiers(evaluation)):
        if style is not None and not classifier.styles:
            raise ConfigError(
                f"{key}: knows no styles, so it cannot tell whether {style!r} is forgotten; choose another classifier, "
                "or set evaluate.enabled=false"
            )
    build_metrics(settings, 1, 0, lambda where, features, _: first_reference_features(where, features))


def load_classifiers(evaluation: Evaluation) -> list[Classifier]:
    """The classifier, and the witness where there is one."""
    settings, world = evaluation.settings, evaluation.world
    found = [load_classifier(settings.classifier, world.objects, world.styles)]
    if settings.witness is not None:
        try:
            found.append(load_classifier(settings.witness, world.objects, world.styles))
        except ConfigError as error:
            raise ConfigError(str(error).replace("evaluate.classifier=", "evaluate.witness=")) from error
    return found


def check_prompts(evaluation: Evaluation, backbone: Backbone) -> None:
    """Raises ConfigError when a prompt of the evaluation is too long for the text encoders."""
    prompts = list(dict.fromkeys(request.prompt for request in evaluation.requests))
    backbone.tokenized(prompts, negative=False)


def evaluate(
    evaluation: Evaluation,
    backbone: Backbone,
    net: nn.Module,
    group: Group,
    folder: Path,
    forgotten: Sequence[Concept],
    label: str,
    stop: StopRequest | None,
    model: str | None = None,
) -> dict[str, Any]:
    """Draw, recognise and score; returns the scores on every rank. All ranks enter.

    Writes scores.json, answers.json, images.csv and the images to keep into `folder`. `forgotten` are the concepts that
    the model should have forgotten by now; `label` names the evaluation in the progress bar and in a stop message.
    `model` names the weights: an evaluation of the same ones that was stopped goes on from the images that it drew.
    """
    settings, world, classifiers = evaluation.settings, evaluation.world, load_classifiers(evaluation)
    batches = as_batches(evaluation.requests, settings.batch)
    group.on_first(lambda: make_folder(folder / "images"))
    num_images = _num_rounds(batches, group) * settings.batch  # that one rank draws at most
    shared = partial(shared_reference_features, group=group, device=backbone.device, folder=evaluation.shared)
    metrics = build_metrics(settings, num_images * group.size, num_images * group.rank, shared)
    verdicts: list[list[BatchVerdict]] = [[] for _ in classifiers]
    total = 0
    made_by = None if model is None else _made_by(model, evaluation, backbone, net)
    with DrawnImages(folder / "images", evaluation, made_by) as files:
        group.on_first(lambda: files.remove(keep=file_names(evaluation).values()))
        for number, images, passes in _draw_batches(evaluation, backbone, net, group, batches, files, label, stop):
            batch = batches[number]
            total += passes
            for classifier, found in zip(classifiers, verdicts) if batch[0].judged else ():
                found.append((number, *_recognise(classifier, images)))
            counted = [i for i, request in enumerate(batch) if evaluation.counts_for_metrics(request)]
            for metric in metrics if counted else ():
                metric.update(images[counted], [batch[i].prompt for i in counted])
        checksums = files.finish()
    of_ranks = group.to_all((verdicts, checksums, total))
    extra = _metric_results(metrics, group)

    def score() -> dict[str, Any]:
        judged = [request for batch in batches for request in batch if request.judged]
        plain = np.array([not request.paraphrased for request in judged])  # [N]
        by_classifier = zip(*(of_rank for of_rank, _, _ in of_ranks))  # for each, the verdicts of every rank
        answers, *witnessed = (collect_answers(judged, list(chain(*found))) for found in by_classifier)
        scores = compute_scores(evaluation, judged, answers, forgotten)
        scores["plain"] |= {"extra": extra, "made_by": evaluation.fingerprint, "subset": evaluation.most}
        lists = answers_as_lists(select_answers(answers, plain), world)
        for of_witness in witnessed:
            scores["witness"] = compute_scores(evaluation, judged, of_witness, forgotten)["plain"]
            lists["witness"] = answers_as_lists(select_answers(of_witness, plain), world)
        write_record(folder / "answers.json", lists)
        listed = images_csv(evaluation, files.kept, dict(item for _, found, _ in of_ranks for item in found.items()))
        write_atomically(folder / "images.csv", listed.encode())
        scores |= {"passes": sum(count for _, _, count in of_ranks), "files": {"images.csv": text_sha256(listed)}}
        write_record(folder / "scores.json", scores)
        files.remove(keep=files.kept.values())
        return scores

    return group.on_first(score)


def _made_by(model: str, evaluation: Evaluation, backbone: Backbone, net: nn.Module) -> str:
    """A checksum over the weights' name and what decides how they draw, beside the requests."""
    dtypes = [str(next(net.parameters()).dtype), *backbone.frozen_dtypes]
    settings = [evaluation.settings.steps, evaluation.settings.batch, backbone.image_size, backbone.size_ids]
    return text_sha256(json.dumps([model, dtypes, settings]))[:16]


def draw(settings: EvaluateConfig, backbone: Backbone, net: nn.Module, batch: Sequence[ImageRequest]) -> Tensor:
    """Images of these requests, which share one guidance, uint8 [B, 3, h, w]."""
    generators = [torch.Generator().manual_seed(request.seed) for request in batch]
    noise = torch.stack([torch.randn(*backbone.latent_shape, generator=rng) for rng in generators])  # [B, C, H, W]
    cond = backbone.embed([request.prompt for request in batch])
    negative = backbone.embed([""] * len(batch), negative=True)
    denoiser, guidance = backbone.denoiser(net), batch[0].guidance
    latents = backbone.sample(denoiser, noise.to(backbone.device), cond, negative, settings.steps, guidance)
    return backbone.decode(latents)


def _num_rounds(batches: Sequence[Sequence[ImageRequest]], group: Group) -> int:
    """How many batches each rank draws, rounded up."""
    return (len(batches) + group.size - 1) // group.size


def _draw_batches(
    evaluation: Evaluation,
    backbone: Backbone,
    net: nn.Module,
    group: Group,
    batches: Sequence[Sequence[ImageRequest]],
    files: DrawnImages,
    label: str,
    stop: StopRequest | None,
) -> Iterator[tuple[int, Tensor, int]]:
    """This rank's batches: number, images, uint8 [B, 3, h, w], and the passes that drew them.

    Rank r of n has the batches r, r + n, r + 2n, ... A sharded net needs every rank in every forward, so a rank without
    a batch of its own redraws the last one and discards it. Rounds that an earlier call has drawn are read from files.
    """

    def draw_uncounted(batch: Sequence[ImageRequest]) -> tuple[Tensor, int]:
        before = backbone.passes
        with backbone.temporary_embeddings() if batch[0].listed else nullcontext():
            images = draw(evaluation.settings, backbone, net, batch)
        passes, backbone.passes = backbone.passes - before, before
        return images, passes

    rounds: Sequence[int] = range(_num_rounds(batches, group))
    drawn_before = _drawn_before(batches, files, group, lambda batch: draw_uncounted(batch)[0])
    for round_ in progress(rounds, f"evaluate {label}", group.is_first):
        if stop is not None:
            stop.check(f"the evaluation {label}")
        first = round_ * group.size
        number = first + group.rank
        batch = batches[min(number, len(batches) - 1)]
        if drawn_before.issuperset(range(first, min(first + group.size, len(batches)))):
            found = files.load(batch)
            assert found is not None
            images, passes = found[0].to(backbone.device), found[1] * len(batch)
            if number < len(batches):
                files.take(batch)
        else:
            images, passes = draw_uncounted(batch)
            if number < len(batches):
                files.save(batch, images, passes // len(batch))
        if number < len(batches):
            backbone.passes += passes
            yield number, images, passes


def _drawn_before(
    batches: Sequence[Sequence[ImageRequest]],
    files: DrawnImages,
    group: Group,
    draw_again: Callable[[Sequence[ImageRequest]], Tensor],
) -> set[int]:
    """The numbers of the batches whose images an earlier call has written.

    The first of them is drawn again. Where the machine, the libraries or the number of ranks draw it differently,
    nothing of the earlier call is used.
    """
    if files.made_by is None:
        return set()
    mine = [n for n in range(group.rank, len(batches), group.size) if files.load(batches[n]) is not None]
    found = {number for of_rank in group.to_all(mine) for number in of_rank}
    if not found:
        return found
    images, before = draw_again(batches[min(found)]), files.load(batches[min(found)])
    same = before is not None and torch.equal(images.cpu(), before[0])
    if all(group.to_all(same)):
        return found
    group.on_first(files.remove)  # or a later call could take some of them beside images of this one
    return set()


def _metric_results(metrics: Sequence[Metric], group: Group) -> dict[str, float]:
    """The results of all metrics, from the sum of all ranks' states."""
    results: dict[str, float] = {}
    for metric in metrics:
        found = metric.result({name: group.sum(total.to(group.device)) for name, total in metric.state().items()})
        assert not found.keys() & results.keys(), f"two metrics report {sorted(found.keys() & results.keys())}"
        results |= found
    return results


def _recognise(classifier: Classifier, images: Tensor) -> tuple[list[int], list[int] | None]:
    verdict = classifier.classify(images)
    return verdict.objects.tolist(), None if verdict.styles is None else verdict.styles.tolist()
