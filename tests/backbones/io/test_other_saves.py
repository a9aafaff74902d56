"""Models as other programs left them: names of torch.compile and DataParallel, the hub's cache, nets for inpainting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness import PROJECT
from safetensors.torch import load_file, save_file

from sculpt_dist.backbones.formats.original import read_single_file, write_single_file
from sculpt_dist.backbones.io.folders import stored_weights, weight_files
from sculpt_dist.backbones.io.writing import copy_unwrapped, is_wrapped
from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ModelError
from sculpt_dist.planning.check import check_run

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas"
CONFIG = PROJECT / "configs" / "canvas" / "dm_cal.yaml"
PREFIXES = ["_orig_mod.", "module.", "module._orig_mod."]


@pytest.fixture
def model(tmp_path):
    shutil.copytree(ASSETS / "sd15", tmp_path / "model")
    return tmp_path / "model"


def wrapped(part: Path, prefix: str) -> None:
    for file in weight_files(part):
        save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_torch_compile_and_of_data_parallel_are_stripped(model, tmp_path, prefix):
    wrapped(model / "unet", prefix), wrapped(model / "text_encoder", prefix)
    run = tmp_path / "run"
    found = check_run(load_config(CONFIG, [f"model.path={model}", f"run.folder={run}"]), 1)
    assert found["compared_weights"]
    (copy,) = run.glob(".base-*")
    for part in ("unet", "text_encoder", "vae"):
        plain = dict(stored_weights(ASSETS / "sd15", part))
        assert all(torch.equal(tensor, plain.pop(name)) for name, tensor in stored_weights(copy, part))
        assert not plain


def test_prefixes_are_stripped_from_an_index_too(model, tmp_path):
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    shard = file.with_name("diffusion_pytorch_model-00001-of-00001.safetensors")
    wrapped(model / "unet", "_orig_mod.")
    file.rename(shard)
    index = {"weight_map": dict.fromkeys(load_file(shard), shard.name)}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    assert is_wrapped(model) and not is_wrapped(ASSETS / "sd15")
    copy_unwrapped(model, tmp_path / "copy")
    content = json.loads((tmp_path / "copy" / "unet" / f"{file.name}.index.json").read_text())
    assert content["weight_map"].keys() == dict(stored_weights(tmp_path / "copy", "unet")).keys()
    assert not is_wrapped(tmp_path / "copy")


def test_a_single_file_of_a_compiled_model_is_read(model, tmp_path):
    write_single_file(model, tmp_path / "plain.safetensors")
    held = load_file(tmp_path / "plain.safetensors")
    mark = "model.diffusion_model."
    named = {name.replace(mark, f"{mark}_orig_mod."): tensor for name, tensor in held.items()}
    save_file(named, tmp_path / "compiled.safetensors")
    read_single_file(tmp_path / "compiled.safetensors", model, tmp_path / "back")
    plain = dict(stored_weights(model, "unet"))
    assert all(torch.equal(tensor, plain[name]) for name, tensor in stored_weights(tmp_path / "back", "unet"))


def test_the_root_of_a_hub_cache_is_refused_with_the_folder_to_give(model, tmp_path):
    root = tmp_path / "hub" / "models--owner--name"
    snapshot = root / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    for folder in (root, root / "snapshots", root.parent):
        with pytest.raises(ModelError, match=f"no diffusers pipeline folder .*; give {snapshot}$"):
            check_run(load_config(CONFIG, [f"model.path={folder}", f"run.folder={tmp_path / 'run'}"]), 1)


def test_an_inpainting_model_is_named_as_one(model, tmp_path):
    index = model / "model_index.json"
    content = json.loads(index.read_text()) | {"_class_name": "StableDiffusionInpaintPipeline"}
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="holds a StableDiffusionInpaintPipeline.*this is an inpainting model"):
        check_run(load_config(CONFIG, [f"model.path={model}", f"run.folder={tmp_path / 'run'}"]), 1)
    write_single_file(ASSETS / "sd15", tmp_path / "plain.safetensors")
    held = load_file(tmp_path / "plain.safetensors")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    held[first] = torch.zeros(len(held[first]), 9, 3, 3)
    save_file(held, tmp_path / "inpainting.safetensors")
    with pytest.raises(ModelError, match="is .*9, 3, 3.*this is an inpainting model"):
        read_single_file(tmp_path / "inpainting.safetensors", ASSETS / "sd15", tmp_path / "back")
