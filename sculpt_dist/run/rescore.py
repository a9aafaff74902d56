"""Draws some images of an audit bundle again, and compares the verdicts with those that it records."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sculpt_dist.backbones.io.folders import CHECKSUMS
from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError, RunFolderError
from sculpt_dist.core.files import by_number
from sculpt_dist.evaluation.evaluator import draw, load_classifiers
from sculpt_dist.evaluation.requests import as_batches
from sculpt_dist.run.model import base_fingerprint, open_backbone
from sculpt_dist.run.setup import resolve

MOST_WRONG = 0.05  # of the verdicts may differ, as another machine rounds otherwise


def rescore(place: Path, model: Path, most: int) -> tuple[int, int]:
    """(verdicts that are the same, images) for up to `most` images, evenly of all with plain prompts.

    Raises ConfigError for another model than the bundle's, RunFolderError where more than 5 % of the verdicts differ.
    """
    with _unpacked(place) as bundle:
        if (model / CHECKSUMS).read_bytes() != (bundle / "model" / CHECKSUMS).read_bytes():
            raise ConfigError(f"{model}: its {CHECKSUMS} are not those of the bundle: give the model that it is about")
        setup = resolve(load_config(bundle / "config.yaml"))
        stages = sorted(bundle.glob("evaluation/after-*/answers.json"), key=by_number)
        if not stages:
            raise RunFolderError(f"{place}: holds no answers: the run was not evaluated")
        answers: dict[str, Any] = json.loads(stages[-1].read_bytes())
    evaluation, group = setup.evaluation, setup.join_ranks()
    batches = as_batches(evaluation.requests, evaluation.settings.batch)
    plain = [request for batch in batches for request in batch if request.judged and not request.paraphrased]
    if len(plain) != len(answers["object_seen"]):
        raise RunFolderError(f"{place}: its answers are {len(answers['object_seen']):,}, its images {len(plain):,}")
    chosen = list(range(0, len(plain), -(-len(plain) // most)))
    base_fingerprint(model)  # compares its files with the checksums
    backbone, classifier = open_backbone(setup.config.model, group, model, model), load_classifiers(evaluation)[0]
    same, size = 0, evaluation.settings.batch
    for guidance in dict.fromkeys(plain[i].guidance for i in chosen):  # a batch shares it
        alike = [i for i in chosen if plain[i].guidance == guidance]
        for part in (alike[first : first + size] for first in range(0, len(alike), size)):
            verdict = classifier.classify(draw(evaluation.settings, backbone, backbone.net, [plain[i] for i in part]))
            columns = [(verdict.objects, answers["object_seen"])]
            columns += [] if verdict.styles is None else [(verdict.styles, answers["style_seen"])]
            agree = [[int(value) == said[i] for value, i in zip(found, part)] for found, said in columns]
            same += sum(map(all, zip(*agree)))
    if len(chosen) - same > MOST_WRONG * len(chosen):
        raise RunFolderError(f"{place}: only {same:,} of {len(chosen):,} images drawn again are judged as recorded")
    return same, len(chosen)


@contextmanager
def _unpacked(place: Path) -> Iterator[Path]:
    """The bundle as a folder. Its files were compared with their checksums before."""
    if place.is_dir():
        yield place
        return
    with TemporaryDirectory() as folder, zipfile.ZipFile(place) as packed:
        packed.extractall(folder)  # leaves out what would lie outside
        yield Path(folder)
