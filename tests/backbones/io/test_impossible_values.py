"""Settings and weights that no model can have: one line when they are read, by `check` as well as by a run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import PROJECT
from safetensors.torch import load_file, save_file

from sculpt_dist.backbones.io.folders import weight_files
from sculpt_dist.backbones.sana import Backbone as Sana
from sculpt_dist.backbones.sd15 import Backbone
from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.planning.check import check_run

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas"
CONFIG = PROJECT / "configs" / "canvas" / "dm_cal.yaml"
SCHEDULER = "scheduler/scheduler_config.json"
CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path):
    shutil.copytree(ASSETS / "sd15", tmp_path / "model")
    return tmp_path / "model"


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weight(part: Path, dtype: torch.dtype, value: float) -> str:
    """Put a value into the last weight matrix of a component; returns its name."""
    (file,) = weight_files(part)
    held = load_file(file)
    name = next(name for name in reversed(held) if name.endswith(".weight"))
    held[name] = torch.full_like(held[name], value).to(dtype)
    save_file(held, file, {"format": "pt"})
    return name


def one_line(raised: pytest.ExceptionInfo[ModelError]) -> bool:
    return "\n" not in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"num_train_timesteps": 10**12}, "num_train_timesteps=1000000000000: must be a whole number from 1 to 10,000"),
        ({"num_train_timesteps": -1}, "num_train_timesteps=-1: must be"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0: must be"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps=1000: must be"),
        ({"num_train_timesteps": True}, "num_train_timesteps=True: must be"),
        ({"beta_start": float("nan")}, "beta_start=nan: must be a number between 0 and 1"),
        ({"beta_end": -0.1}, "beta_end=-0.1: must be"),
        ({"beta_end": "large"}, "beta_end=large: must be"),
        ({"trained_betas": [float("nan")] * 1000}, "trained_betas=.*: must be a list of 1000 numbers"),
        ({"trained_betas": [0.1]}, "trained_betas=.*: must be a list of 1000 numbers"),
        ({"beta_schedule": "unheard"}, "no DPMSolverMultistepScheduler can be made of these settings"),
    ],
)
def test_impossible_scheduler_settings_are_found_when_they_are_read(model, changes, found):
    edit(model / SCHEDULER, **changes)
    with pytest.raises(ModelError, match=f"scheduler_config.json: {found}") as raised:
        Backbone(model, torch.float32, CPU)
    assert one_line(raised)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"scaling_factor": float("nan")}, "scaling_factor=nan: must be finite and above 0"),
        ({"scaling_factor": 0}, "scaling_factor=0: must be"),
        ({"scaling_factor": "0.18"}, "scaling_factor=0.18: must be"),
        ({"latents_mean": [0.0, float("inf")]}, r"latents_mean=.*: must be finite numbers"),
        ({"latents_mean": [0, 0, 0, 0], "latents_std": [1, 1, 0, 1]}, r"latents_std=.*: must be finite and above 0"),
    ],
)
def test_impossible_scales_of_the_autoencoder_are_found_when_they_are_read(model, changes, found):
    edit(model / "vae" / "config.json", **changes)
    with pytest.raises(ModelError, match=f"vae/config.json: {found}") as raised:
        Backbone(model, torch.float32, CPU)
    assert one_line(raised)


def test_an_impossible_image_size_is_found_when_it_is_read(model):
    edit(model / "unet" / "config.json", sample_size=10**12)
    with pytest.raises(ConfigError, match=r"asks for images of 4000000000000 pixels: must be at most 16,384"):
        Backbone(model, torch.float32, CPU)


@pytest.mark.parametrize("shift", [float("nan"), -1.0, "3", 1e30])
def test_an_impossible_shift_is_found_when_it_is_read(tmp_path, shift):
    shutil.copytree(ASSETS / "sana", tmp_path / "model")
    edit(tmp_path / "model" / SCHEDULER, flow_shift=shift)
    with pytest.raises(ModelError, match="flow_shift=.*: must be a number between 0 and 1,000"):
        Sana(tmp_path / "model", torch.float32, CPU)


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
def test_weights_that_are_not_finite_are_found_by_check(model, part):
    name = change_weight(model / part, torch.float16, float("nan"))
    with pytest.raises(ModelError, match=f"{part}: {re.escape(name)} holds values that are not finite") as raised:
        check_run(load_config(CONFIG, [f"model.path={model}"]), 1)
    assert one_line(raised)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8])
def test_integers_as_weights_are_refused(model, dtype):
    name = change_weight(model / "vae", dtype, 1)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ModelError, match=f"vae: {re.escape(name)} is stored as {kind}: quantised or damaged"):
        Backbone(model, torch.float32, CPU)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_an_index_without_a_component_that_is_used_is_refused(model, part):
    edit(model / "model_index.json", **{part: None})
    with pytest.raises(ModelError, match=f"model_index.json: {part} is null, so an export could not be loaded"):
        Backbone(model, torch.float32, CPU)
