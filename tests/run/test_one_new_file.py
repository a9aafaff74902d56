"""A method, a guard, a model, a metric, a classifier, an attack and a tracker are one new file each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import PROJECT, TINY_RUN, rank_environment

WORLD = PROJECT / "configs" / "canvas" / "world.yaml"
NEW_FILES = {
    "methods/fade.py": '''
"""Fade: the target's prompt learns what the empty prompt draws."""

from dataclasses import dataclass

from sculpt_dist.core.types import Losses
from sculpt_dist.data.streams import StreamSpec
from sculpt_dist.maths.losses import mse
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.base import matrices


@dataclass(frozen=True)
class Config:
    """The options of fade."""

    name: str = "fade"
    """Name of this method."""
    weight: float = 1.0
    """Weight of the only term."""


class Method(Base):
    def __init__(self, config):
        self.config = config

    def trainable(self, groups):
        return matrices(groups, "text_to_image.v")

    def streams(self):
        return (StreamSpec("target"), StreamSpec("plain", ("superclass",), share=0.5))

    def saliency(self, step):
        return self.losses(step)

    def losses(self, step):
        target, plain = step.batch.target, step.batch["plain"]
        assert len(plain) * 2 == len(target)
        time = step.backbone.sample_time(step.rng.uniform("time"))
        noisy, _ = step.corrupted(target, time, "target")
        (label,) = step.frozen("teacher").without_gradient([(noisy, time, step.empty(len(noisy)))])
        return Losses({"fade": self.config.weight * mse(step.student(noisy, time, target.cond), label)})
''',
    "guards/dim.py": '''
"""Dim: what the net predicts for the prompt comes closer to what it predicts for no prompt."""

from dataclasses import dataclass

import torch

from sculpt_dist.guards.base import Guard
from sculpt_dist.guards.parts.calls import with_output


@dataclass(frozen=True)
class Config:
    """The options of dim."""

    name: str = "dim"
    """Name of this guard."""
    share: float = 0.5
    """How far it comes."""


class Method(Guard):
    def fit(self, fitting):
        return {"share": torch.tensor(self.config.share)}

    def act(self, net, fitted, doubled):
        def dimmed(predicted):
            negative, prompt = predicted.chunk(2)
            return torch.cat([negative, torch.lerp(prompt, negative, fitted["share"].to(prompt))])

        def after(net, args, output):
            return with_output(output, dimmed) if doubled() else None

        return [net.register_forward_hook(after)]
''',
    "backbones/sd15_again.py": '''
"""Stable Diffusion 1.x once more, under another name."""

from sculpt_dist.backbones.sd15 import Backbone as StableDiffusion


class Backbone(StableDiffusion):
    pass
''',
    "evaluation/metrics/brightness.py": '''
"""The mean brightness of the images."""

from dataclasses import dataclass

import torch

from sculpt_dist.evaluation.metrics.base import Metric


@dataclass(frozen=True)
class Options:
    scale: float = 1.0


def build(context, options):
    return None if options is None else Brightness(options.scale)


class Brightness(Metric):
    def __init__(self, scale):
        self.scale, self.sums = scale, torch.zeros(2, dtype=torch.float64)

    def update(self, images, prompts):
        self.sums += torch.tensor([images.double().mean(dim=(1, 2, 3)).sum(), len(images)])

    def state(self):
        return {"sums": self.sums}

    def result(self, state):
        return {"brightness": self.scale * float(state["sums"][0] / state["sums"][1])}
''',
    "evaluation/classifiers/first.py": '''
"""Says that every image shows the first object and the first style."""

import torch

from sculpt_dist.evaluation.classifiers.base import Classifier, Verdict


class Judge(Classifier):
    def classify(self, images):
        zeros = torch.zeros(len(images), dtype=torch.int64)
        return Verdict(zeros, zeros if self.styles else None)
''',
    "attacks/echo.py": '''
"""Says the prompt twice."""

from dataclasses import dataclass, replace

from sculpt_dist.attacks.base import Attack as Base
from sculpt_dist.attacks.base import Attempt


@dataclass(frozen=True)
class Config:
    times: int = 2
    """How often the prompt is said."""


class Attack(Base):
    def attempts(self, victim, cases):
        for place, case in enumerate(cases):
            prompt = " ".join([case.prompt] * self.config.times)
            if victim.model.backbone.takes(prompt):
                yield Attempt(place, victim.model.draw(replace(case, prompt=prompt)), found={"prompt": prompt})
''',
    "track/sinks/note.py": '''
"""Writes the number of steps into note.txt."""

from sculpt_dist.track.sinks.base import Sink as Base


class Sink(Base):
    def __init__(self, track, values, folder, step):
        self.folder, self.steps = folder, 0

    def log(self, entry):
        self.steps += 1

    def stage(self, step, stage, scores, picture):
        pass

    def finish(self, step, report, model):
        (self.folder / "report" / "note.txt").write_text(str(self.steps))

    def close(self, outcome):
        pass
''',
}
COMPARISON = """
folder: {folder}
against: fade
overrides: {overrides}
sequences: {{one: [{{target: bird, superclass: animal}}]}}
rows: [{{name: fade, config: {config}}}]
tables: [{{title: One, sequence: one, backbones: [sd15_again], seeds: [0]}}]
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the package with these files added."""
    root = tmp_path_factory.mktemp("extended")
    package = root / "sculpt_dist"
    shutil.copytree(PROJECT / "sculpt_dist", package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    os.symlink(PROJECT / "sculpt_dist" / "assets", package / "assets")
    for name, text in NEW_FILES.items():
        (package / name).write_text(text.lstrip())
    return root


def run(extended: Path, *arguments: str, code: int = 0) -> str:
    environment = rank_environment() | {"PYTHONPATH": str(extended)}
    command = [sys.executable, "-m", "sculpt_dist", *arguments]
    done = subprocess.run(
        command, cwd=extended, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout[-4000:]
    return done.stdout


def test_the_new_files_are_listed(extended):
    assert "fade" in run(extended, "methods") and "sd15_again" in run(extended, "models")
    assert "brightness" in run(extended, "metrics") and "Says that every image" in run(extended, "metrics")
    assert "echo" in run(extended, "attacks") and "attack.options.echo.times" in run(
        extended, "config", "attack.options"
    )
    assert "dim" in run(extended, "methods") and "method.dim.share" in run(extended, "config", "method.dim")
    assert "method.fade.weight" in run(extended, "config", "method.fade")
    assert "Did you mean 'method.weight'" in run(
        extended, "unlearn", str(WORLD), "method.name=fade", "method.wight=2", code=2
    )


@pytest.mark.slow
def test_they_run_through_compare_and_report(extended, tmp_path):
    overrides = [
        *TINY_RUN[:-1],  # the comparison names the concepts
        "method={name: fade, weight: 0.5}",
        f"model.path={PROJECT / 'sculpt_dist' / 'assets' / 'canvas' / 'sd15'}",
        "mask.keep=1",
        "evaluate.classifier=first",
        "evaluate.metrics={brightness: {scale: 2.0}}",
        "evaluate.objects=[cat, bird]",
        "evaluate.styles=[sketch]",
        "track.sinks=[note]",
        'prepare.prompts.object=["a {concept}"]',
        "evaluate.attacks=[echo]",
    ]
    file = tmp_path / "comparison.yaml"
    file.write_text(COMPARISON.format(folder=tmp_path / "out", overrides=json.dumps(overrides), config=WORLD))
    run(extended, "compare", str(file))
    folder = tmp_path / "out" / "one" / "sd15_again" / "fade" / "seed-0"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["terms"].keys() == {"fade"} and line["loss"] > 0 for line in lines)
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["method"] == "fade" and 0 < report["after"]["extra"]["brightness"] <= 510
    assert report["after"]["targets"]["bird"]["accuracy"] == 0.0, "the new classifier sees cats everywhere"
    assert (folder / "report" / "note.txt").read_text() == str(len(lines))
    page = (tmp_path / "out" / "compare.md").read_text()
    assert "brightness" in page and "| plain | echo |" in page
    (folder / "report" / "report.html").unlink()
    assert "report:" in run(extended, "report", str(folder)) and (folder / "report" / "report.html").is_file()


@pytest.mark.slow
def test_the_new_guard_runs_and_its_model_is_scored_with_it(extended, tmp_path):
    arguments = [
        str(WORLD),
        *TINY_RUN,
        "method={name: dim, share: 1.0}",
        f"model.path={PROJECT / 'sculpt_dist' / 'assets' / 'canvas' / 'sd15'}",
        f"run.folder={tmp_path / 'run'}",
        "evaluate.objects=[bird, boat]",
        "evaluate.styles=[sketch]",
    ]
    run(extended, "unlearn", *arguments)
    run(extended, "evaluate", *arguments)
    stages = ("before", "after-01", "model")
    files = [tmp_path / "run" / "evaluation" / stage / "scores.json" for stage in stages]
    before, after, model = (json.loads(file.read_text())["plain"]["UA"] for file in files)
    assert before < after == model, "without the prompt no bird and no boat is drawn"
