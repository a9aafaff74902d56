"""The backbone against the plain diffusers pipeline, and what a pipeline folder must hold."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import PROJECT

from sculpt_dist.backbones.folders import find_folder, stored_weights, write_pipeline
from sculpt_dist.backbones.sd15 import Backbone
from sculpt_dist.errors import ModelError

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas" / "sd15"


@pytest.fixture(scope="module")
def backbone():
    return Backbone.load(ASSETS, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    loaded = StableDiffusionPipeline.from_pretrained(ASSETS, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_sampling_equals_the_plain_pipeline(backbone, pipeline):
    noise = torch.randn(3, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    prompts = ["a photo of a cat", "a photo of a boat in neon style", "bird"]
    cond, negative = backbone.embed(prompts), backbone.embed(["a photo of a fish"] * 3)
    ours = backbone.sample(backbone.denoiser(backbone.net), noise, cond, negative, steps=5, guidance=3.0)
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 32, "width": 32, "latents": noise}
    theirs = pipeline(prompts, negative_prompt=["a photo of a fish"] * 3, output_type="latent", **options).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    pixels = pipeline(prompts, negative_prompt=["a photo of a fish"] * 3, output_type="np", **options).images
    difference = backbone.decode(ours).permute(0, 2, 3, 1).int() - torch.from_numpy((pixels * 255).round()).int()
    assert difference.abs().max() <= 1


def test_corruption_equals_the_schedulers(backbone):
    from diffusers import DDPMScheduler

    clean, noise = torch.randn(2, 4, *backbone.latent_shape)
    time = torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(backbone.corrupt(clean, noise, time), DDPMScheduler.from_config(backbone.scheduler.config).add_noise(clean, noise, time))
    assert torch.equal(backbone.goal(clean, noise, time), noise)


def test_v_prediction_goal_is_the_schedulers_velocity(tmp_path):
    from diffusers import DDIMScheduler

    shutil.copytree(ASSETS, tmp_path / "v")
    file = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    turned = Backbone.load(tmp_path / "v", torch.float32, torch.device("cpu"))
    clean, noise = torch.randn(2, 3, *turned.latent_shape)
    time = torch.tensor([1, 300, 998])
    velocity = DDIMScheduler.from_config(turned.scheduler.config).get_velocity(clean, noise, time)
    torch.testing.assert_close(turned.goal(clean, noise, time), velocity)


def test_encoding_gives_latents_as_the_denoiser_expects(backbone, pipeline):
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(backbone.encode(pixels), expected)
    assert backbone.image_size == 32 and backbone.latent_shape == (4, 8, 8)


def test_times_are_uniform_over_the_schedule_or_a_window(backbone):
    uniform = (torch.arange(1000) + 0.5) / 1000
    assert backbone.sample_time(uniform).tolist() == list(range(1000))
    assert int(backbone.sample_time(torch.tensor([0.0]), (0.5, 1.0))) == 500


def test_each_prompt_is_encoded_once_and_embeddings_are_kept(backbone, tmp_path, monkeypatch):
    prompts = ["a photo of a house", "a photo of a car", "a photo of a house"]
    cond = backbone.embed(prompts)
    assert torch.equal(cond.tokens[0], cond.tokens[2]) and not torch.equal(cond.tokens[0], cond.tokens[1])
    backbone.write_embeddings(tmp_path / "e.safetensors", "key", prompts[:2])
    other = Backbone.load(ASSETS, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(other, "encode_prompts", lambda prompts: pytest.fail("encoded again"))
    assert not other.read_embeddings(tmp_path / "e.safetensors", "another key")
    assert other.read_embeddings(tmp_path / "e.safetensors", "key")
    assert torch.equal(other.embed(prompts).tokens, cond.tokens)


def test_groups_name_the_cross_attention(backbone):
    groups = backbone.groups()
    assert all(name.endswith("attn2.to_k.weight") for name in groups["cross_attention.k"]) and len(groups["cross_attention.k"]) == 4
    assert len(groups["cross_attention.out"]) == 8  # weight and bias
    assert set(groups["all"]) == {name for name, _ in backbone.net.named_parameters()}
    assert not set(groups["not_cross_attention"]) & set(groups["cross_attention"])


def test_shipped_model_is_the_default_and_other_archs_say_that_there_is_none():
    assert find_folder(None, "sd15", None) == ASSETS
    with pytest.raises(ModelError, match="no shipped canvas model for model.arch=flux"):
        find_folder(None, "flux", None)


def test_a_pipeline_of_another_class_is_refused(tmp_path):
    shutil.copytree(ASSETS, tmp_path / "xl")
    index = tmp_path / "xl" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionXLPipeline"))
    with pytest.raises(ModelError, match="StableDiffusionXLPipeline, model.arch expects StableDiffusionPipeline"):
        Backbone.load(tmp_path / "xl", torch.float32, torch.device("cpu"))


def test_a_sampler_with_noise_of_its_own_is_refused(tmp_path):
    shutil.copytree(ASSETS, tmp_path / "m")
    file = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "EulerAncestralDiscreteScheduler"}))
    with pytest.raises(ModelError, match="deterministic scheduler"):
        Backbone.load(tmp_path / "m", torch.float32, torch.device("cpu"))


def test_an_export_takes_only_what_was_loaded(tmp_path, backbone):
    base = tmp_path / "base"
    shutil.copytree(ASSETS, base)
    (base / "v1-5-pruned.safetensors").write_bytes(b"the whole original model")
    (base / "v1-5.ckpt").write_bytes(b"pickle")
    (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (base / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    text = base / "text_encoder" / "model.safetensors"
    text.rename(text.with_name("model.fp16.safetensors"))  # only a variant is there
    write_pipeline(base, tmp_path / "out", "unet", torch.float32, stored_weights(base, "unet"))
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.suffix != ".json")
    weights = ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    assert [name for name in files if "." in name] == weights
    again = Backbone.load(tmp_path / "out", torch.float32, torch.device("cpu"))
    torch.testing.assert_close(again.embed(["a photo of a cat"]).tokens, backbone.embed(["a photo of a cat"]).tokens)


def test_a_hub_that_cannot_be_reached_is_said_to_be_the_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="nobody/nothing.*network"):
        find_folder("nobody/nothing", "sd15", None)
