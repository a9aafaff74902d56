"""The dry run on full-size settings: what it counts, and that each typical mistake is found without weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import PROJECT, sculpt

from sculpt_dist.backbones.sd15 import Backbone as StableDiffusion
from sculpt_dist.cli import main as cli
from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.core.types import Losses
from sculpt_dist.methods import dm_cal
from sculpt_dist.methods.base import Editor
from sculpt_dist.planning.check import check_run, shard_elements

CANVAS = PROJECT / "sculpt_dist" / "assets" / "canvas" / "sd15"
CANVAS_CONFIG = PROJECT / "configs" / "canvas" / "dm_cal.yaml"


def checked(models: Path, arch: str, *overrides: str, ranks: int = 2) -> dict[str, Any]:
    config = load_config(PROJECT / "configs" / arch / "dm_cal.yaml", [f"model.path={models / arch}", *overrides])
    return check_run(config, ranks)


def changed(models: Path, arch: str, part: str, into: Path, **settings: Any) -> str:
    """An override that names a copy of a folder with other settings of one part."""
    shutil.copytree(models / arch, into)
    file = into / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return f"model.path={into}"


def attention(width: int, text: int) -> int:
    """Weights of one cross-attention: query and output [c, c], key and value [c, D]; the output's bias stays frozen."""
    return 2 * width * width + 2 * width * text


# millions of parameters; cross-attention weights, biases left out, and their matrices; latents, tokens, image side
SIZES = {
    "sd15": (
        859.5,
        5 * attention(320, 768) + 5 * attention(640, 768) + 6 * attention(1280, 768),
        64,
        [4, 64, 64],
        [77, 768],
        512,
    ),
    "sdxl": (2567.5, 10 * attention(640, 2048) + 60 * attention(1280, 2048), 280, [4, 128, 128], [77, 2048], 1024),
    "sana": (1604.5, 20 * attention(2240, 2240), 80, [32, 32, 32], [300, 2304], 1024),
}


@pytest.mark.parametrize("arch", SIZES)
def test_the_shipped_configuration_fits_the_full_size_model(models, arch):
    millions, trained, matrices, latents, tokens, side = SIZES[arch]
    found = checked(models, arch)
    assert found["parameters"] / 1e6 == pytest.approx(millions, abs=0.05)
    assert (found["trainable"], found["matrices"]) == (trained, matrices)
    assert (found["latents"], found["tokens"], found["image"]) == ([1, *latents], [1, *tokens], [3, side, side])
    assert (found["micro_batch"], found["steps"], found["compared_weights"]) == (1, 500, False)
    assert found["shard"] == found["trainable"] // 2


def test_shards_are_cut_as_deepspeed_cuts_them():
    sizes = [56, 56, 56, 4]  # deepspeed 0.19.8 gave these with the biases and norms of the canvas net
    assert [shard_elements(sizes, stage, 3) for stage in (0, 1, 2, 3)] == [172, 58, 58, 59]
    assert [shard_elements([56, 56, 2016, 4], stage, 3) for stage in (1, 3)] == [712, 712]


def test_a_text_width_that_is_not_the_encoders_is_found(models, tmp_path):
    with pytest.raises(
        ModelError,
        match=r"unet, the saliency on latents \[1, 4, 64, 64\] and tokens \[1, 77, 768\]: .*(1024|shape|dim)",
    ):
        checked(models, "sd15", changed(models, "sd15", "unet", tmp_path / "wrong", cross_attention_dim=1024))


def test_a_wrong_width_of_the_size_conditions_is_found(models, tmp_path):
    with pytest.raises(ModelError, match="unet, the saliency .*config.json"):
        checked(
            models,
            "sdxl",
            changed(models, "sdxl", "unet", tmp_path / "wrong", projection_class_embeddings_input_dim=2048),
        )


def test_an_autoencoder_of_another_model_is_found(models, tmp_path):
    with pytest.raises(ModelError, match=r"vae, decoding latents \[4, 64, 64\]"):
        checked(models, "sd15", changed(models, "sd15", "vae", tmp_path / "wrong", latent_channels=16))


def test_settings_that_build_nothing_are_found(models, tmp_path):
    with pytest.raises(ModelError, match="unet/config.json: no UNet2DConditionModel can be built from it"):
        checked(models, "sd15", changed(models, "sd15", "unet", tmp_path / "wrong", block_out_channels=[320, 640]))
    with pytest.raises(
        ModelError, match="text_encoder/config.json: no CLIPTextModel can be built from it: .*attention heads"
    ):
        checked(models, "sd15", changed(models, "sd15", "text_encoder", tmp_path / "odd", num_attention_heads=7))


MISTAKES = {
    "the batch": (["train.batch=3"], "train.batch=3 is not divisible by ranks 2"),
    "a long prompt": (
        ['prepare.prompts.object=["a photo of {concept}' + " and more" * 80 + '"]'],
        "the text encoder takes 77",
    ),
    "a part of the attention": (["method.parts=[q, w]"], r"method.parts contains \['w'\]"),
    "a part that the net has not": (
        ["method.parts=[q, pooled]"],
        "trains the group 'pooled_text', which UNet2DConditionModel lacks",
    ),
    "no concepts": (["concepts=[]"], "concepts is empty"),
    "the plan": (["mask.collect=0"], "mask.collect=0"),
    "the image size": (["model.image_size=100"], "multiple of 8"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_configuration_is_found(models, mistake):
    overrides, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message):
        checked(models, "sd15", *overrides)


def test_another_kind_of_pipeline_is_named(models):
    with pytest.raises(
        ModelError, match="holds a StableDiffusionPipeline, model.arch expects StableDiffusionXLPipeline"
    ):
        checked(models, "sd15", "model.arch=sdxl")


def test_a_run_still_needs_the_weights(models):
    with pytest.raises(ModelError, match="no .safetensors weights"):
        StableDiffusion(models / "sd15", torch.float32, torch.device("cpu"))


TRAINED = {
    "a group that is not there": (
        lambda method, groups: groups["cross_attention.b"],
        "group 'cross_attention.b', which UNet2DCondition",
    ),
    "a parameter that is not there": (lambda method, groups: ["conv_in.wait"], "conv_in.wait, which"),
    "a bias": (lambda method, groups: ["conv_in.bias"], r"conv_in.bias, \[56\]: only matrices"),
    "nothing": (lambda method, groups: [], "trains nothing"),
}


@pytest.mark.parametrize("case", TRAINED)
def test_a_method_that_trains_what_cannot_train_is_found(monkeypatch, case):
    trainable, message = TRAINED[case]
    monkeypatch.setattr(dm_cal.Method, "trainable", trainable)
    with pytest.raises(ConfigError, match=message):
        check_run(load_config(CANVAS_CONFIG), 1)


def test_a_loss_that_trains_nothing_is_found(monkeypatch):
    monkeypatch.setattr(
        dm_cal.Method, "losses", lambda method, step: Losses({"forget": step.batch.target.latents.mean()})
    )
    with pytest.raises(ConfigError, match="loss group 0 .*none of the weights"):
        check_run(load_config(CANVAS_CONFIG), 1)


def test_an_adapter_is_what_trains(monkeypatch):
    monkeypatch.setattr(dm_cal.Method, "adapter", lambda self, groups: {"r": 2, "target_modules": ["attn2.to_k"]})
    found = check_run(load_config(CANVAS_CONFIG), 1)
    plain = load_config(CANVAS_CONFIG, ["method.parts=[k]"])
    monkeypatch.setattr(dm_cal.Method, "adapter", lambda self, groups: None)
    layers = check_run(plain, 1)["matrices"]
    assert found["matrices"] == 2 * layers and 0 < found["trainable"] < check_run(plain, 1)["trainable"]


def test_a_closed_form_is_checked_without_its_edit(monkeypatch):
    class Never(Editor):
        def edit(self, backbone, concepts):
            raise AssertionError("an edit needs values")

    monkeypatch.setattr("sculpt_dist.run.setup.load_method", lambda options: Never())
    assert "trainable" not in check_run(load_config(CANVAS_CONFIG), 1)


def test_stored_weights_of_other_shapes_are_found(tmp_path):
    path = changed(CANVAS.parent, "sd15", "unet", tmp_path / "wrong", block_out_channels=[56, 96])
    with pytest.raises(
        ModelError, match=r"unet: \d+ weights do not fit config.json, first .*: stored \(.*\), config \("
    ):
        check_run(load_config(CANVAS_CONFIG, [path]), 1)


def test_the_command_prints_what_would_train():
    printed = sculpt("check", str(CANVAS_CONFIG), "--ranks", "2")
    assert "92,160 in 16 matrices" in printed and "fit" in printed


def test_the_command_ends_with_2_for_what_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sculpt-dist", "check", str(CANVAS_CONFIG), "--ranks", "5"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "train.batch=12 is not divisible by ranks 5" in capsys.readouterr().err
