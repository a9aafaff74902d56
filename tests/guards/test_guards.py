"""Guards on plain diffusers pipelines and on our backbones: they draw the same, come off again, and refuse what is not
theirs.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from guarding import ASSETS, backbone_of, fitted

from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.core.files import file_sha256, unsealed, write_record
from sculpt_dist.core.plugins import METHODS, check_plugin, plugin, plugins
from sculpt_dist.guards import Guard, apply, guard_backbone, read_guard, remove
from sculpt_dist.guards.parts.calls import with_output, with_rows
from sculpt_dist.guards.parts.layers import transformer_blocks

GUARDS = plugins("sculpt_dist.guards")
ARCHS = ("sd15", "sdxl", "sana")
PROMPTS = ["a photo of a cat", "a photo of a bird in neon style"]


def plain_pipeline(arch: str):
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(ASSETS / arch, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def noise_of(backbone) -> torch.Tensor:
    return torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))


def ours(backbone) -> torch.Tensor:
    """Latents of PROMPTS, drawn by our sampler."""
    cond, negative = backbone.embed(PROMPTS), backbone.embed([""] * 2, negative=True)
    return backbone.sample(backbone.denoiser(backbone.net), noise_of(backbone), cond, negative, 4, 3.0)


def theirs(pipeline, backbone, guidance: float = 3.0) -> torch.Tensor:
    """The same, drawn by the plain pipeline."""
    options = {"num_inference_steps": 4, "guidance_scale": guidance, "height": 32, "width": 32, "output_type": "latent"}
    start = noise_of(backbone) * (
        getattr(pipeline.scheduler, "init_noise_sigma", 1.0) if "Sana" in str(type(pipeline)) else 1.0
    )
    return pipeline(PROMPTS, latents=start, **options | backbone.pipeline_options()).images


@pytest.fixture(scope="module")
def pipelines():
    return {arch: plain_pipeline(arch) for arch in ARCHS}


@pytest.fixture(scope="module")
def sld(tmp_path_factory) -> Path:
    return fitted("sld", "sd15", tmp_path_factory.mktemp("sld") / "guard")


@pytest.mark.parametrize("name", GUARDS)
def test_a_guard_file_has_a_frozen_config_named_like_the_file_and_a_guard(name):
    module = plugin(METHODS, name, "method.name")
    assert is_dataclass(module.Config) and module.Config.__dataclass_params__.frozen
    assert {f.name: f.default for f in fields(module.Config)}["name"] == name
    assert issubclass(module.Method, Guard) and module.Method.kind == "guards"


def test_no_guard_has_the_name_of_a_method():
    assert len(plugins(METHODS)) == len(set(plugins(METHODS)))
    assert check_plugin(METHODS, "uce", "method.name") == "sculpt_dist.methods"
    with pytest.raises(ConfigError, match=r"method.name=adavt: there is no such method. Did you mean 'adavd'\?"):
        check_plugin(METHODS, "adavt", "method.name")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", GUARDS)
def test_a_plain_pipeline_draws_as_our_backbone_and_without_the_guard_as_before(pipelines, tmp_path, name, arch):
    guard, pipeline, backbone = fitted(name, arch, tmp_path / "guard"), pipelines[arch], backbone_of(arch)
    before = theirs(pipeline, backbone)
    apply(pipeline, guard)
    guarded = theirs(pipeline, backbone)
    with pytest.raises(ModelError, match="has a guard already"):
        apply(pipeline, guard)
    remove(pipeline)
    assert torch.equal(theirs(pipeline, backbone), before)
    with pytest.raises(ModelError, match="has no guard that could be removed"):
        remove(pipeline)
    guard_backbone(backbone, guard)
    largest = before.abs().max()
    assert (guarded - before).abs().max() > 0.01 * largest, "the guard acts"
    torch.testing.assert_close(ours(backbone) / largest, guarded / largest, rtol=1e-3, atol=1e-5)
    assert torch.equal(ours(backbone), ours(backbone)), "nothing of a drawing stays for the next one"


@pytest.mark.parametrize("name", ["sld", "negative_prompt"])
def test_without_guidance_a_guard_of_the_guidance_does_nothing(pipelines, tmp_path, name):
    backbone, guard = backbone_of("sd15"), fitted(name, "sd15", tmp_path / "guard")
    before = theirs(pipelines["sd15"], backbone, guidance=1.0)
    apply(pipelines["sd15"], guard)
    after = theirs(pipelines["sd15"], backbone, guidance=1.0)
    remove(pipelines["sd15"])
    assert torch.equal(before, after)


def test_a_guard_stays_on_a_net_that_is_loaded_again(sld):
    backbone = backbone_of("sd15")
    guard_backbone(backbone, sld)
    guarded = ours(backbone)
    backbone.load_net(torch.float32)
    assert torch.equal(ours(backbone), guarded)
    backbone.passes = 0
    ours(backbone)
    assert backbone.passes == 4 * 3 * len(PROMPTS), "three passes a step and image"


def test_what_is_written_is_read_back_and_written_the_same_again(sld, tmp_path):
    again = fitted("sld", "sd15", tmp_path / "again")
    assert {f.name: file_sha256(f) for f in sld.iterdir()} == {f.name: file_sha256(f) for f in again.iterdir()}
    found = read_guard(sld)
    assert found.guard.config.level == "max" and found.about["targets"] == ["bird", "boat"]
    assert {name: tuple(t.shape) for name, t in found.tensors.items()} == {"tokens": (10, 64)}


@pytest.mark.parametrize("arch", ["sdxl", "sana"])
def test_a_guard_of_another_kind_of_model_is_refused(pipelines, sld, arch):
    with pytest.raises(ModelError, match="the guard sld was fitted to a denoiser with .*: fit the guard to this model"):
        apply(pipelines[arch], sld)


def damaged(folder: Path, place: Path, file: str, change) -> Path:
    shutil.copytree(folder, place)
    change(place / file)
    return place


def rewrite(**changes):
    return lambda file: write_record(file, {**unsealed(json.loads(file.read_text())), **changes})


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("guard.json", lambda file: file.unlink(), "is no guard"),
        ("guard.json", lambda file: file.write_text("{"), "guard.json is damaged"),
        (
            "guard.json",
            lambda file: file.write_text(file.read_text().replace("max", "weak")),
            "differ from its checksum",
        ),
        (
            "guard.safetensors",
            lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"),
            "guard.safetensors is damaged",
        ),
        ("guard.safetensors", lambda file: file.unlink(), "is no guard"),
        ("guard.json", rewrite(options={"name": "shield"}), "name=shield: there is no such guard"),
        ("guard.json", rewrite(options={"name": "uce"}), "name=uce: there is no such guard"),
        ("guard.json", rewrite(options={"name": "sld", "speed": 1}), "speed"),
        ("guard.json", rewrite(options=[]), "no settings"),
        ("guard.json", rewrite(net={"class": "UNet2DConditionModel"}), "was fitted to a denoiser with"),
    ],
)
def test_a_folder_that_is_no_guard_of_ours_is_refused(pipelines, sld, tmp_path, file, change, message):
    with pytest.raises((ModelError, ConfigError), match=message):
        apply(pipelines["sd15"], damaged(sld, tmp_path / "damaged", file, change))


def test_something_that_is_no_pipeline_is_refused(sld):
    with pytest.raises(ModelError, match="object: has no unet or transformer"):
        apply(object(), sld)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sld", {"level": "mild"}, "method.level=mild"),
        ("saeuron", {"percentile": 100.0}, "method.percentile=100"),
        ("saeuron", {"active": 0}, "method.active=0"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    module = plugin(METHODS, name, "method.name")
    with pytest.raises(ConfigError, match=message):
        module.Method(module.Config(**options))


def test_a_block_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="method.block=9: the denoiser has transformer blocks 0 to "):
        fitted("saeuron", "sd15", tmp_path, "method.block=9")


def test_the_middle_block_of_stable_diffusion_is_the_published_one():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        blocks = list(transformer_blocks(UNet2DConditionModel(cross_attention_dim=768)))
    assert len(blocks) == 16 and blocks[len(blocks) // 2] == "up_blocks.1.attentions.1"


def test_only_what_has_a_row_per_image_is_changed():
    rows, scalar = torch.zeros(4, 2), torch.tensor(3)
    args, kwargs = with_rows(
        (rows, scalar), {"added": {"text_embeds": rows}, "n": 4}, lambda name, x: x + (name == "pooled")
    )
    assert torch.equal(args[0], rows) and args[1] is scalar and kwargs["n"] == 4
    assert torch.equal(kwargs["added"]["text_embeds"], rows + 1)


def test_the_first_tensor_of_every_kind_of_output_is_changed():
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    one = torch.ones(1)
    assert with_output(one, torch.neg) == -1 and with_output((one, "rest"), torch.neg) == (-1, "rest")
    assert with_output(UNet2DConditionOutput(sample=one), torch.neg).sample == -1


def test_adavd_says_so_where_fused_projections_keep_it_from_acting(tmp_path):
    backbone = backbone_of("sd15")
    pipeline = plain_pipeline("sd15")
    apply(pipeline, fitted("adavd", "sd15", tmp_path))
    pipeline.fuse_qkv_projections(vae=False)
    with pytest.raises(ModelError, match=r"UNet2DConditionModel: .* undo fuse_qkv_projections"):
        theirs(pipeline, backbone)
    pipeline.unfuse_qkv_projections(vae=False)
    theirs(pipeline, backbone)
