"""A metric is one file: the configuration names it, sets its options, and its result reaches scores.json."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import PROJECT

from sculpt_dist.backbones.sd15 import Backbone
from sculpt_dist.config.load import load_config
from sculpt_dist.config.schema import EvaluateConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import read_object
from sculpt_dist.evaluation import metrics
from sculpt_dist.evaluation.evaluator import check_evaluation, evaluate
from sculpt_dist.evaluation.metrics.base import build_metrics
from sculpt_dist.evaluation.requests import resolve_evaluation

BRIGHTNESS = '''
"""The mean of all pixels."""

from dataclasses import dataclass

import torch

from sculpt_dist.evaluation.metrics.base import Metric


@dataclass(frozen=True)
class Options:
    scale: float = 1.0


def build(context, options):
    return None if options is None else Score(options.scale)


class Score(Metric):
    def __init__(self, scale):
        self.scale = scale
        self.sums = {name: torch.zeros((), dtype=torch.float64) for name in ("sum", "count")}

    def update(self, images, prompts):
        self.sums["sum"] += images.double().mean((1, 2, 3)).sum()
        self.sums["count"] += len(images)

    def state(self):
        return {name: total.clone() for name, total in self.sums.items()}

    def result(self, state):
        return {"brightness": self.scale * float(state["sum"] / state["count"])}
'''


@pytest.fixture
def brightness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file among the metrics."""
    (tmp_path / "brightness.py").write_text(BRIGHTNESS)
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
    yield
    sys.modules.pop("sculpt_dist.evaluation.metrics.brightness", None)
    vars(metrics).pop("brightness", None)


@pytest.mark.usefixtures("brightness")
def test_a_new_file_is_a_metric_once_the_configuration_names_it():
    assert build_metrics(EvaluateConfig(), 1, 0) == []
    for options, expected in (({}, 10), ({"scale": 0.5}, 5)):
        (metric,) = build_metrics(EvaluateConfig(metrics={"brightness": options}), 1, 0)
        metric.update(torch.full((2, 3, 4, 4), 10, dtype=torch.uint8), ["", ""])
        assert metric.result(metric.state()) == {"brightness": expected}


@pytest.mark.usefixtures("brightness")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "evaluate.metrics.brightnes={}",
            "evaluate.metrics=brightnes: there is no such metric. Did you mean 'brightness'",
        ),
        (
            "evaluate.metrics.brightness.skale=1",
            "evaluate.metrics.brightness.skale: .*evaluate.metrics.brightness.scale",
        ),
        ("evaluate.metrics.brightness.scale=wide", "evaluate.metrics.brightness.scale: .*wide"),
        ("evaluate.metrics.brightness.scale=-1", "evaluate.metrics.brightness.scale=-1.0: must be a finite number"),
        ("evaluate.metrics.base={}", "evaluate.metrics=base: there is no such metric"),
    ],
)
def test_unknown_metrics_and_options_are_named_before_training(override, message):
    config = load_config(None, [override])
    with pytest.raises(ConfigError, match=message):
        check_evaluation(resolve_evaluation(config.evaluate, config.concepts))


@pytest.mark.parametrize(("name", "key"), [("fid", "reference"), ("kid", "reference"), ("clip_score", "clip")])
def test_a_named_metric_says_which_key_it_needs(name, key):
    with pytest.raises(
        ConfigError, match=f"evaluate.{key} is not set, but a metric named in evaluate.metrics needs it"
    ):
        build_metrics(EvaluateConfig(metrics={name: {}}), 1, 0)


def test_metrics_set_to_null_are_none():
    assert build_metrics(load_config(None, ["evaluate.metrics=null"]).evaluate, 1, 0) == []


class OneRank(SimpleNamespace):
    """A group of one rank without a process group."""

    rank, size, is_first, device = 0, 1, True, torch.device("cpu")

    def to_all(self, value):
        return [value]

    def sum(self, values):
        return values

    def on_first(self, work):
        return work()


@pytest.mark.usefixtures("brightness")
def test_the_result_of_a_new_metric_reaches_the_scores(tmp_path):
    overrides = [
        "concepts=[{target: cat, superclass: animal}]",
        "evaluate.objects=[cat, fish]",
        "evaluate.styles=[neon]",
    ]
    config = load_config(None, [*overrides, "evaluate.images=1", "evaluate.steps=1", "evaluate.metrics.brightness={}"])
    evaluation = resolve_evaluation(config.evaluate, config.concepts)
    backbone = Backbone(PROJECT / "sculpt_dist/assets/canvas/sd15", torch.float32, torch.device("cpu"))
    scores = evaluate(evaluation, backbone, backbone.net, OneRank(), tmp_path, config.concepts, "test", None)
    assert 0 < scores["plain"]["extra"]["brightness"] < 255
    assert read_object(tmp_path / "scores.json", "") == scores
    assert json.loads((tmp_path / "answers.json").read_text())["objects"] == ["cat", "fish"]
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == ["cat--neon.png", "fish--neon.png"]
