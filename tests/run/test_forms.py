"""Models as users bring and take them, through the commands: single files in, single files and deltas out."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch
from harness import PROJECT, SMALL, TINY_RUN, sculpt, weights
from safetensors import safe_open
from safetensors.torch import load_file

from sculpt_dist.backbones.formats.original import write_single_file

SDXL = PROJECT / "sculpt_dist" / "assets" / "canvas" / "sdxl"
BASE = load_file(SDXL / "unet" / "diffusion_pytorch_model.safetensors")
QUICK = [
    *SMALL,
    "evaluate.enabled=false",
    "train.steps=2",
    "concepts=[{target: bird, superclass: animal}]",
    "model.arch=sdxl",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, canvas_config):
    """A run from a single file, and the arguments that name it."""
    folder = tmp_path_factory.mktemp("forms")
    write_single_file(SDXL, folder / "base.safetensors")
    arguments = [
        *QUICK,
        f"model.path={folder / 'base.safetensors'}",
        f"model.config={SDXL}",
        f"run.folder={folder / 'run'}",
    ]
    sculpt("unlearn", canvas_config, *arguments)
    return folder, arguments


def test_a_single_file_is_unlearned_and_only_cross_attention_matrices_changed(run):
    changed = {name for name, tensor in weights(run[0] / "run").items() if not torch.equal(tensor, BASE[name].float())}
    assert changed and all(".attn2.to_" in name and name.endswith(".weight") for name in changed)


@pytest.mark.slow
def test_the_result_exports_as_a_single_file_that_diffusers_reads(run, canvas_config):
    from diffusers import StableDiffusionXLPipeline

    folder, arguments = run
    printed = sculpt(
        "export", canvas_config, *arguments, "--as", "single", "--output", str(folder / "forgot.safetensors")
    )
    assert "forgot.safetensors" in printed
    loaded = StableDiffusionXLPipeline.from_single_file(
        folder / "forgot.safetensors", config=str(SDXL), local_files_only=True
    )
    exported = weights(folder / "run")
    assert all(torch.equal(exported[name], tensor.float()) for name, tensor in loaded.unet.state_dict().items())


def test_a_delta_is_small_and_applies_and_reverts(run, canvas_config):
    folder, arguments = run
    sculpt("export", canvas_config, *arguments, "--as", "delta")
    delta = folder / "run" / "delta.safetensors"
    assert delta.stat().st_size < (SDXL / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size / 5
    sculpt("apply", str(delta), str(SDXL), str(folder / "applied"))
    applied = load_file(folder / "applied" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(
        torch.equal(applied[name], tensor.to(applied[name].dtype)) for name, tensor in weights(folder / "run").items()
    )
    sculpt("apply", str(delta), str(folder / "applied"), str(folder / "again"), "--remove")
    again = load_file(folder / "again" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[name], BASE[name]) for name in BASE)
    assert "already applied" in sculpt("apply", str(delta), str(folder / "applied"), str(folder / "twice"), code=2)
    assert "choose one of folder, single, delta" in sculpt("export", canvas_config, *arguments, "--as", "zip", code=2)


def test_the_result_of_a_closed_form_exports_in_every_form(tmp_path):
    config, run = str(PROJECT / "configs" / "canvas" / "uce.yaml"), tmp_path / "run"
    arguments = [config, *TINY_RUN, "evaluate.enabled=false", f"run.folder={run}"]
    assert "has no model yet" in sculpt("export", *arguments, "--as", "lora", code=2)
    sculpt("unlearn", *arguments)
    for form, file in (
        ("single", "model.safetensors"),
        ("delta", "delta.safetensors"),
        ("lora", "lora/pytorch_lora_weights.safetensors"),
        ("kohya", "kohya.safetensors"),
    ):
        sculpt("export", *arguments, "--as", form)
        with safe_open(run / file, "pt") as content:
            says = content.metadata()
        adapter = {"single": "", "delta": "/delta"}.get(form, "/lora")
        assert says["modelspec.architecture"] == f"stable-diffusion-v1{adapter}"
        assert says["modelspec.title"] == says["ss_output_name"] == "canvas-sd15 without bird and boat"
        assert says["modelspec.resolution"] == "32x32" and says["ss_sd_model_name"] == "canvas-sd15"
        assert json.loads(says["sculpt_dist.concepts"]) == ["bird", "boat"] and says["sculpt_dist.method"] == "uce"
        assert says["sculpt_dist.version"] == version("sculpt-dist") and "modelspec.license" not in says
    assert sorted(path.name for path in (run / "lora").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "pytorch_lora_weights.safetensors",
    ]
    card = (run / "lora" / "README.md").read_text()
    assert "- lora\n" in card and 'pipeline.load_lora_weights("path/to/this/folder")' in card
    assert "The adapter of rank 16: " in card
    sculpt("apply", str(run / "delta.safetensors"), str(PROJECT / "sculpt_dist/assets/canvas/sd15"), str(run / "out"))
    assert (run / "out" / "README.md").read_text() == (run / "model" / "README.md").read_text()
    base = load_file(PROJECT / "sculpt_dist/assets/canvas/sd15/unet/diffusion_pytorch_model.safetensors")
    changed = {name for name, tensor in weights(run).items() if not torch.equal(tensor, base[name].float())}
    held = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    assert {
        name.removeprefix("unet.").replace("lora_A.weight", "weight") for name in held if "lora_A" in name
    } == changed
