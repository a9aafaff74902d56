"""Building a world's models, with a few steps of each training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sculpt_dist.backbones.sd15 import Backbone
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.worlds import pretrain
from sculpt_dist.worlds.base import ClassifierPlan
from sculpt_dist.worlds.canvas import world as canvas
from sculpt_dist.worlds.pretrain import build


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Trainings of the canvas take three steps; returns a list that grows by the steps that were computed."""
    plan = replace(canvas.WORLD.classifiers["classifier"], steps=3, batch=8)
    monkeypatch.setattr(canvas, "WORLD", replace(canvas.WORLD, per_pair=2, classifiers={"classifier": plan}))
    size = replace(Backbone.tiny["small"], vae_steps=3, steps=3, vae_batch=4, batch=4)
    monkeypatch.setattr(Backbone, "tiny", {"small": size})
    monkeypatch.setattr(pretrain, "measure_samples", lambda *_: {"classifier/object/form0": 0.5})
    monkeypatch.setattr(pretrain, "wrong_pairs", lambda *_: ["cat/neon"])
    computed, loss = [], torch.Tensor.backward

    def counted(self, *args, **kwargs):
        computed.append(1)
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", counted)
    return computed


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{part}/{name}": tensor
        for part in ("unet", "vae", "text_encoder")
        for file in (folder / "sd15" / part).glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_a_build_writes_its_models_and_a_second_one_trains_nothing_again(few_steps, tmp_path):
    report = build("canvas", "sd15", tmp_path / "first")
    assert len(few_steps) == 9 and {"classifier/object", "vae/psnr", "classifier/object/form0"} <= report.keys()
    first = stored(tmp_path / "first")
    assert {tensor.dtype for tensor in first.values() if tensor.is_floating_point()} == {torch.float16}
    assert '"wrong_pairs": [\n  "cat/neon"' in (tmp_path / "first" / "sd15.json").read_text()

    build("canvas", "sd15", tmp_path / "first")
    assert len(few_steps) == 9, "what is finished is not trained again"
    build("canvas", "sd15", tmp_path / "second")
    for folder in ("first", "second"):
        again = stored(tmp_path / folder)
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_another_seed_or_other_settings_train_anew_in_the_same_folder(few_steps, tmp_path, monkeypatch):
    build("canvas", "sd15", tmp_path)
    first = stored(tmp_path)
    monkeypatch.setattr(Backbone, "tiny", {"small": replace(Backbone.tiny["small"], batch=5)})
    build("canvas", "sd15", tmp_path)
    assert len(few_steps) == 9 + 3, "only the denoiser has another batch"
    assert not torch.equal(stored(tmp_path)["unet/conv_in.weight"], first["unet/conv_in.weight"])
    build("canvas", "sd15", tmp_path, seed=1)
    assert len(few_steps) == 9 + 3 + 9


def test_a_build_is_refused_before_anything_is_trained(few_steps, tmp_path, monkeypatch):
    (tmp_path / "sd15").mkdir()
    (tmp_path / "sd15" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="sd15 is there already, and was not built"):
        build("canvas", "sd15", tmp_path)
    assert (tmp_path / "sd15" / "mine.txt").read_text() == "mine"
    monkeypatch.setattr(Backbone, "tiny", {})
    with pytest.raises(ConfigError, match="--arch sd15: this kind has no small model, which the canvas needs"):
        build("canvas", "sd15", tmp_path / "other")
    assert not few_steps and not (tmp_path / "other").exists()


def test_a_classifier_of_separable_layers_has_a_prediction_for_each_image():
    from sculpt_dist.worlds.classifier import WorldClassifier

    plan = ClassifierPlan(channels=(8, 16), strides=(2, 2), layers="separable")
    objects, styles = WorldClassifier(plan, 7, 3)(torch.zeros(2, 3, 32, 32))
    assert objects.shape == (2, 7) and styles.shape == (2, 3)
