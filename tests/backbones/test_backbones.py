"""Backbones agree with the plain diffusers pipelines, and refuse folders that are none."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from harness import PROJECT

from sculpt_dist.backbones.io.find import find_folder
from sculpt_dist.backbones.io.folders import load_tokenizer, stored_weights
from sculpt_dist.backbones.io.writing import write_pipeline
from sculpt_dist.backbones.parts.options import Options
from sculpt_dist.backbones.parts.tiny import clip_text_encoder, tiny_unet
from sculpt_dist.backbones.parts.trajectory import Trajectory
from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.core.plugins import plugin, plugins
from sculpt_dist.worlds.canvas.world import WORLD as CANVAS

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas" / "sd15"
CPU = torch.device("cpu")
ARCHS = plugins("sculpt_dist.backbones")
WORLD = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 32}
CALL = {  # what the plain pipelines of tiny nets need
    "sana": {"use_resolution_binning": False, "complex_human_instruction": None, "max_sequence_length": 10}
}
SCHEDULERS = [
    ("sd15", {}),
    ("sd15", {"prediction_type": "v_prediction"}),
    ("sd15", {"_class_name": "DDIMScheduler", "clip_sample": False}),
    ("sd15", {"_class_name": "DDIMScheduler", "clip_sample": True, "steps_offset": 0}),  # the pipeline overrides both
    ("sdxl", {"_class_name": "EulerDiscreteScheduler"}),
    ("sdxl", {"prediction_type": "v_prediction"}),
    ("sana", {}),
    ("sana", {"flow_shift": 3.0}),
    ("sana", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}),
]


def kind(arch: str):
    return plugin("sculpt_dist.backbones", arch, "model.arch").Backbone


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A folder of each kind with random weights."""
    folder = tmp_path_factory.mktemp("untrained")
    for arch in ARCHS:
        kind(arch).write_untrained(folder / arch, CANVAS.words, 3, kind(arch).tiny[CANVAS.size])
    return folder


@pytest.fixture
def folder_with(untrained, tmp_path):
    """A copy of a kind's folder with other scheduler settings."""

    def make(arch: str, settings: dict) -> Path:
        shutil.copytree(untrained / arch, tmp_path / arch)
        file = tmp_path / arch / "scheduler" / "scheduler_config.json"
        changed = json.loads(file.read_text()) | settings
        file.write_text(json.dumps(changed))
        index = tmp_path / arch / "model_index.json"
        content = json.loads(index.read_text())
        index.write_text(json.dumps(content | {"scheduler": ["diffusers", changed["_class_name"]]}))
        return tmp_path / arch

    return make


def plain_pipeline(folder: Path):
    """The pipeline as a user's script loads it."""
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def backbone():
    return kind("sd15")(ASSETS, torch.float32, CPU)


def assert_samples_as_the_plain_pipeline(arch: str, folder: Path) -> None:
    """Equal latents, and equal pixels up to rounding, for three prompts and a negative one."""
    ours, theirs = kind(arch)(folder, torch.float32, CPU), plain_pipeline(folder)
    noise = torch.randn(3, *ours.latent_shape, generator=torch.Generator().manual_seed(1))
    prompts, negative = ["a photo of a cat", "a photo of a boat in neon style", "bird"], ["a photo of a fish"] * 3
    conditions = ours.embed(prompts), ours.embed(negative, negative=True)
    latents = ours.sample(ours.denoiser(ours.net), noise, *conditions, steps=4, guidance=3.0)
    options = WORLD | CALL.get(arch, {}) | {"negative_prompt": negative}
    start = noise * getattr(theirs.scheduler, "init_noise_sigma", 1.0) if arch == "sana" else noise
    expected = theirs(prompts, latents=start, output_type="latent", **options).images
    largest = expected.abs().max()  # 51 with Euler; changing the noise's last bit moves latents by 1.3e-6 of it
    torch.testing.assert_close(latents / largest, expected / largest, rtol=1e-4, atol=4e-6)
    pixels = theirs(prompts, latents=start, output_type="np", **options).images
    difference = ours.decode(latents).permute(0, 2, 3, 1).int() - torch.from_numpy((pixels * 255).round()).int()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize(("arch", "settings"), SCHEDULERS, ids=str)
def test_sampling_equals_the_plain_pipeline(folder_with, arch, settings):
    assert_samples_as_the_plain_pipeline(arch, folder_with(arch, settings))


def test_a_checkpoint_like_stable_diffusion_2_1_samples_as_its_pipeline(folder_with):
    """It has another text width and activation, linear projections, heads by level, and v-prediction."""
    folder = folder_with(
        "sd15", {"prediction_type": "v_prediction", "_class_name": "PNDMScheduler", "skip_prk_steps": True}
    )
    tokenizer = load_tokenizer(folder, "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        encoder = clip_text_encoder(tokenizer, width=96)
        unet = tiny_unet(kind("sd15").tiny["small"], 96, use_linear_projection=True)
    for name, part in (("text_encoder", encoder), ("unet", unet)):
        shutil.rmtree(folder / name)
        part.save_pretrained(folder / name)
    for name, change in (("text_encoder", {"hidden_act": "gelu"}), ("unet", {"attention_head_dim": [7, 8]})):
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert_samples_as_the_plain_pipeline("sd15", folder)


@pytest.mark.parametrize("zeros", [True, False])
def test_guidance_without_a_negative_prompt_equals_the_plain_pipelines(untrained, tmp_path, zeros):
    shutil.copytree(untrained / "sdxl", tmp_path / "xl")
    index = tmp_path / "xl" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": zeros}))
    ours, theirs = kind("sdxl")(tmp_path / "xl", torch.float32, CPU), plain_pipeline(tmp_path / "xl")
    noise = torch.randn(1, *ours.latent_shape, generator=torch.Generator().manual_seed(1))
    latents = ours.sample(
        ours.denoiser(ours.net), noise, ours.embed(["a cat"]), ours.embed([""], negative=True), 3, 3.0
    )
    expected = theirs(["a cat"], latents=noise, output_type="latent", **(WORLD | {"num_inference_steps": 3})).images
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("arch", "settings"), SCHEDULERS, ids=str)
def test_corruption_and_goal_equal_the_schedulers_and_one_step_undoes_them(folder_with, arch, settings):
    """Euler's or DDIM's step from a time to zero, given the exact goal, is the clean latent.

    This ties corrupt, goal and time together.
    """
    from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

    ours = kind(arch)(folder_with(arch, settings), torch.float32, CPU)
    clean, noise = torch.randn(2, 4, *ours.latent_shape, generator=torch.Generator().manual_seed(2))
    sampler = ours.schedule.sampler(4)
    if ours.schedule.prediction == "flow_prediction":
        shift = settings.get("flow_shift") or settings.get("shift") or 1.0
        theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
        time = theirs.timesteps[torch.tensor([0, 100, 500, 999])]
        torch.testing.assert_close(
            ours.corrupt(clean, noise, time), theirs.scale_noise(clean, time, noise), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            ours.corrupt(clean, noise, time) - (time / 1000).view(-1, 1, 1, 1) * ours.goal(clean, noise, time), clean
        )
        # the drawn times are those that the sampler visits
        if "_class_name" not in settings:
            uniform = torch.linspace(1 - 1 / 1000, 0, len(sampler.timesteps) + 1)[:-1]
            torch.testing.assert_close(
                ours.sample_time(uniform), sampler.timesteps.float(), rtol=0, atol=1.0
            )  # it rounds down
        return
    time = torch.tensor([1, 10, 500, 999])
    theirs = DDPMScheduler.from_config(ours.schedule.scheduler.config)
    noisy = ours.corrupt(clean, noise, time)
    torch.testing.assert_close(noisy, theirs.add_noise(clean, noise, time))
    expected = noise if ours.schedule.prediction == "epsilon" else theirs.get_velocity(clean, noise, time)
    torch.testing.assert_close(ours.goal(clean, noise, time), expected)
    one = DDIMScheduler.from_config(
        ours.schedule.scheduler.config, clip_sample=False, set_alpha_to_one=True, steps_offset=0
    )
    one.set_timesteps(1)
    for i, t in enumerate(time):
        predicted = ours.goal(clean, noise, time)[i : i + 1]
        undone = one.step(predicted, t, noisy[i : i + 1]).pred_original_sample
        torch.testing.assert_close(undone, clean[i : i + 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("arch", "settings"), SCHEDULERS, ids=str)
@pytest.mark.parametrize("steps", [12, 50])
def test_a_trajectory_has_at_each_step_the_noise_of_the_returned_time(folder_with, arch, settings, steps):
    """A net that predicts the added noise exactly stays on the path of that noise."""
    ours = kind(arch)(folder_with(arch, settings), torch.float32, CPU)
    clean, noise = torch.randn(2, 1, *ours.latent_shape, generator=torch.Generator().manual_seed(2))
    empty, trajectory = ours.embed([""], negative=True), Trajectory(ours)
    trajectory.begin(noise, ["a cat"], steps)
    times = ours.schedule.first_order(steps).timesteps
    trajectory.latents = ours.corrupt(clean, noise, times[:1])
    for index in range(1, steps):
        latents, time = trajectory.advance_to(
            index,
            steps,
            lambda noisy, time, both: ours.goal(
                *(x.expand(2, -1, -1, -1) for x in (clean, noise)), time.to(times.dtype)
            ),
            empty,
            empty,
            1.0,
        )
        every = torch.arange(1000) if ours.schedule.prediction != "flow_prediction" else torch.arange(1000.0)
        pure = clean.expand(1000, -1, -1, -1), noise.expand(1000, -1, -1, -1)
        nearest = (ours.corrupt(*pure, every) - latents).flatten(1).norm(dim=1).argmin()
        assert (
            abs(int(nearest) - float(time)) <= 4
        )  # of 1,000: steps are whole times; with those of linspace 5 and more


def test_flow_times_follow_the_shift_of_the_scheduler(folder_with):
    ours = kind("sana")(folder_with("sana", {"flow_shift": 3.0}), torch.float32, CPU)
    times = ours.sample_time(torch.tensor([0.0, 0.25, 0.5, 0.75]))
    assert times.tolist() == pytest.approx([0.0, 500.0, 750.0, 900.0])  # 3 u / (1 + 2 u)
    assert ours.sample_time(torch.tensor([0.0]), (0.5, 1.0)).item() == pytest.approx(750.0)


@pytest.mark.parametrize("arch", ARCHS)
def test_encoding_scales_latents_as_the_denoiser_expects(untrained, arch):
    ours, theirs = kind(arch)(untrained / arch, torch.float32, CPU), plain_pipeline(untrained / arch)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        encoded = theirs.vae.encode(pixels)
    raw = encoded.latent if arch == "sana" else encoded.latent_dist.mean
    torch.testing.assert_close(ours.encode(pixels), raw * theirs.vae.config.scaling_factor)
    assert ours.image_size == 32 and ours.latent_shape == (4, 8, 8)


def test_an_autoencoder_may_have_statistics_by_channel_and_overflow_in_half_precision(untrained, tmp_path):
    shutil.copytree(untrained / "sdxl", tmp_path / "xl")
    file = tmp_path / "xl" / "vae" / "config.json"
    settings = {
        "latents_mean": [0.5, -1.0, 0.0, 2.0],
        "latents_std": [2.0, 1.0, 0.5, 1.0],
        "force_upcast": True,
        "scaling_factor": 0.5,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    ours, plain = (
        kind("sdxl")(tmp_path / "xl", torch.float16, CPU),
        kind("sdxl")(untrained / "sdxl", torch.float32, CPU),
    )
    assert ours.vae.dtype == torch.float32 and ours.net.dtype == torch.float16
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    raw = plain.encode(pixels) / plain.vae.config.scaling_factor
    mean, std = (torch.tensor(settings[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(ours.encode(pixels), (raw - mean) / std * 0.5)  # as diffusers' SDXL pipeline undoes it
    torch.testing.assert_close(
        ours.decode_pixels(ours.encode(pixels)), plain.decode_pixels(plain.encode(pixels)), rtol=1e-3, atol=1e-4
    )


def test_size_conditions_come_from_the_options_or_from_the_users_images(untrained):
    plain = kind("sdxl")(untrained / "sdxl", torch.float32, CPU)
    assert plain.size_ids == (32, 32, 0, 0, 32, 32) == tuple(plain.embed(["x"]).size_ids[0].tolist())
    assert plain.size_ids_of(64, 128) == (64, 128, 0, 16, 32, 32)
    sized = kind("sdxl")(
        untrained / "sdxl", torch.float32, CPU, Options(original_size=(512, 640), crop=(1, 2), target_size=(24, 24))
    )
    assert sized.size_ids == (512, 640, 1, 2, 24, 24) == sized.size_ids_of(64, 128)
    assert kind("sd15")(untrained / "sd15", torch.float32, CPU).size_ids_of(64, 128) is None


@pytest.mark.parametrize("arch", ARCHS)
def test_another_image_size_is_drawn_or_refused_before_anything_is_loaded(untrained, arch):
    larger = kind(arch)(untrained / arch, torch.float32, CPU, Options(image_size=48))
    assert larger.latent_shape == (4, 12, 12)
    noise = torch.randn(1, *larger.latent_shape)
    latents = larger.sample(
        larger.denoiser(larger.net), noise, larger.embed(["cat"]), larger.embed([""], negative=True), 2, 2.0
    )
    assert larger.decode(latents).shape == (1, 3, 48, 48)
    with pytest.raises(
        ConfigError, match="model.image_size=50: this model needs a multiple of 4|this model needs a multiple of 8"
    ):
        kind(arch)(untrained / arch, torch.float32, CPU, Options(image_size=50))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_prompt_that_is_too_long_is_refused_or_cut_and_the_message_names_the_place(untrained, arch):
    long = "a photo of a cat in natural style a boat a house"
    with pytest.raises(
        ConfigError,
        match="takes 10: it would be cut before '.*a house'; shorten it, or cut it there with model.cut_prompts",
    ):
        kind(arch)(untrained / arch, torch.float32, CPU).embed([long])
    cutting = kind(arch)(untrained / arch, torch.float32, CPU, Options(cut_prompts=True))
    with pytest.warns(UserWarning, match="it is cut before"):
        assert cutting.embed([long]).tokens.shape[1] == 10


def test_sana_prepends_the_instruction_when_its_encoder_has_room(untrained, tmp_path):
    shutil.copytree(untrained / "sana", tmp_path / "sana")
    file = tmp_path / "sana" / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 10**30}))
    file = tmp_path / "sana" / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 8192}))
    ours, theirs = kind("sana")(tmp_path / "sana", torch.float32, CPU), plain_pipeline(tmp_path / "sana")
    instruction = inspect.signature(type(theirs).__call__).parameters["complex_human_instruction"].default
    wanted = theirs.encode_prompt(["A Cat "], complex_human_instruction=instruction)
    cond, negative = ours.embed(["A Cat "]), ours.embed([""], negative=True)
    torch.testing.assert_close(cond.tokens, wanted[0])
    assert torch.equal(cond.token_mask, wanted[1]) and cond.tokens.shape[1] == 300
    torch.testing.assert_close(negative.tokens, wanted[2])
    assert torch.equal(negative.token_mask, wanted[3]) and int(negative.token_mask.sum()) == 1


def test_times_are_uniform_over_the_schedule_or_a_window(backbone):
    uniform = (torch.arange(1000) + 0.5) / 1000
    assert backbone.sample_time(uniform).tolist() == list(range(1000))
    assert int(backbone.sample_time(torch.tensor([0.0]), (0.5, 1.0))) == 500


def test_each_prompt_is_encoded_once_and_embeddings_are_stored(backbone, tmp_path, monkeypatch):
    prompts = ["a photo of a house", "a photo of a car", "a photo of a house"]
    cond = backbone.embed(prompts)
    assert torch.equal(cond.tokens[0], cond.tokens[2]) and not torch.equal(cond.tokens[0], cond.tokens[1])
    backbone.write_embeddings(tmp_path / "e.safetensors", "key", prompts[:2], ["", "a cat"])
    other = kind("sd15")(ASSETS, torch.float32, CPU)
    monkeypatch.setattr(other, "encode_prompts", lambda prompts, negative: pytest.fail("encoded again"))
    assert not other.read_embeddings(tmp_path / "e.safetensors", "another key")
    assert other.read_embeddings(tmp_path / "e.safetensors", "key")
    assert torch.equal(other.embed(prompts).tokens, cond.tokens)
    assert torch.equal(
        other.embed(["", "a cat"], negative=True).tokens, backbone.embed(["", "a cat"], negative=True).tokens
    )


def test_stored_embeddings_take_their_size_conditions_from_the_options(untrained, tmp_path):
    first = kind("sdxl")(untrained / "sdxl", torch.float32, CPU)
    first.write_embeddings(tmp_path / "e.safetensors", "key", ["a cat"], [""])
    other = kind("sdxl")(untrained / "sdxl", torch.float32, CPU, Options(target_size=(64, 48)))
    assert other.read_embeddings(tmp_path / "e.safetensors", "key")
    assert other.embed(["a cat"]).size_ids.tolist() == [[32, 32, 0, 0, 64, 48]]
    assert torch.equal(other.embed(["a cat"]).pooled, first.embed(["a cat"]).pooled)


def test_released_components_are_loaded_again_on_use(untrained):
    ours = kind("sdxl")(untrained / "sdxl", torch.float32, CPU)
    first = ours.embed(["a cat"])
    ours.decode(torch.zeros(1, *ours.latent_shape))
    assert {"vae", "text_encoder", "text_encoder_2"} <= set(ours.loaded)
    ours.release()
    assert not set(ours.parts) & set(ours.loaded)
    assert ours.embed(["a cat"]).tokens is not None and not set(ours.parts) & set(ours.loaded)  # remembered
    assert not torch.equal(ours.embed(["a dog"]).tokens, first.tokens) and "text_encoder" in ours.loaded


@pytest.mark.parametrize(("arch", "blocks"), [("sd15", 5), ("sdxl", 5), ("sana", None)])
def test_groups_have_the_same_names_on_every_backbone(untrained, arch, blocks):
    groups = kind(arch)(untrained / arch, torch.float32, CPU).groups()
    roles = ("text_to_image", "self_attention", "attention", "cross_attention")
    parts = {f"{role}.{part}" for role in roles for part in ("q", "k", "v", "out")}
    assert parts | {*roles, "all", "not_text_to_image", "not_cross_attention", "block.0"} <= set(groups)
    assert all("attn2.to_k." in name for name in groups["text_to_image.k"]) and groups["text_to_image.k"]
    assert set(groups["attention.v"]) == {*groups["text_to_image.v"], *groups["self_attention.v"]}
    assert not set(groups["not_text_to_image"]) & set(groups["text_to_image"])
    aliases = {name: name.replace("cross_attention", "text_to_image") for name in groups if "cross_attention" in name}
    assert len(aliases) == 6 and all(groups[alias] == groups[role] for alias, role in aliases.items())
    depth = [name for name in groups if name.startswith("block.")]
    assert len(depth) == (
        blocks or len({name.split(".")[1] for name in groups["all"] if name.startswith("transformer_blocks")})
    )
    within = [name for block in depth for name in groups[block]]
    assert len(within) == len(set(within)) and set(groups["text_to_image"]) <= set(within) < set(groups["all"])
    if blocks:
        assert [groups[f"block.{i}"][0].split(".")[0] for i in range(5)] == ["down_blocks"] * 2 + ["mid_block"] + [
            "up_blocks"
        ] * 2


def test_the_shipped_model_is_the_default_and_a_missing_one_is_reported():
    assert find_folder(None, "sd15", None) == ASSETS
    with pytest.raises(ModelError, match="no shipped model for model.world=canvas model.arch=flux"):
        find_folder(None, "flux", None)


def test_a_pipeline_of_another_class_is_refused(tmp_path):
    shutil.copytree(ASSETS, tmp_path / "xl")
    index = tmp_path / "xl" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionXLPipeline"))
    with pytest.raises(ModelError, match="StableDiffusionXLPipeline, model.arch expects StableDiffusionPipeline"):
        kind("sd15")(tmp_path / "xl", torch.float32, CPU)


def test_a_sampler_with_noise_of_its_own_is_refused(tmp_path):
    shutil.copytree(ASSETS, tmp_path / "m")
    file = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "EulerAncestralDiscreteScheduler"}))
    with pytest.raises(ModelError, match="deterministic scheduler"):
        kind("sd15")(tmp_path / "m", torch.float32, CPU)


def test_an_export_copies_only_what_was_loaded(tmp_path, backbone):
    base = tmp_path / "base"
    shutil.copytree(ASSETS, base)
    (base / "v1-5-pruned.safetensors").write_bytes(b"the whole original model")
    (base / "v1-5.ckpt").write_bytes(b"pickle")
    (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (base / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    text = base / "text_encoder" / "model.safetensors"
    text.rename(text.with_name("model.fp16.safetensors"))  # only a variant is there
    write_pipeline(base, tmp_path / "out", "unet", torch.float32, stored_weights(base, "unet"))
    files = sorted(
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.suffix != ".json"
    )
    weights = [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert [name for name in files if "." in name] == weights
    again = kind("sd15")(tmp_path / "out", torch.float32, CPU)
    torch.testing.assert_close(again.embed(["a photo of a cat"]).tokens, backbone.embed(["a photo of a cat"]).tokens)


def test_an_unreachable_hub_is_reported_as_a_network_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="nobody/nothing.*network"):
        find_folder("nobody/nothing", "sd15", None)
