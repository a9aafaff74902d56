"""The dtype of each part: frozen parts, drawing and export may differ, and null keeps what model.dtype says."""

from __future__ import annotations

import shutil

import pytest
import torch
from harness import PROJECT, TINY_RUN, sculpt
from safetensors.torch import load_file, save_file

from sculpt_dist.backbones.io.folders import stored_entries
from sculpt_dist.backbones.parts.options import Options
from sculpt_dist.backbones.sana import Backbone as Sana
from sculpt_dist.backbones.sd15 import Backbone
from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError, NonFiniteError
from sculpt_dist.run.fingerprint import deciding_keys

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas"
CONFIG = PROJECT / "configs" / "canvas" / "uce.yaml"
CPU = torch.device("cpu")
PARTS = ("unet", "vae", "text_encoder")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(), (torch.float16, torch.float32, torch.float16)),  # AutoencoderKL asks for fp32
        (
            Options(text_dtype=torch.bfloat16, vae_dtype=torch.float16),
            (torch.float16, torch.float16, torch.bfloat16),
        ),
        (Options(text_dtype=torch.float32), (torch.float16, torch.float32, torch.float32)),
    ],
)
def test_each_part_has_the_dtype_of_its_key(options, expected):
    backbone = Backbone(ASSETS / "sd15", torch.float16, CPU, options)
    assert tuple(backbone.part(name).dtype for name in PARTS) == expected


def test_a_text_encoder_that_overflows_in_half_precision_is_refused_with_the_cure(tmp_path):
    shutil.copytree(ASSETS / "sana", tmp_path / "model")
    file = tmp_path / "model" / "text_encoder" / "model.safetensors"
    held = load_file(file)
    (name,) = [name for name in held if name.endswith("embed_tokens.weight")]
    held[name] = held[name] * (60_000 / held[name].abs().max())  # finite in fp16; Gemma multiplies it by 8
    save_file(held, file, {"format": "pt"})
    half = Sana(tmp_path / "model", torch.float16, CPU)
    with pytest.raises(NonFiniteError, match=r"'a cat', in torch.float16: set model.text_dtype=bfloat16 or float32"):
        half.embed(["a cat"])
    cured = Sana(tmp_path / "model", torch.float16, CPU, Options(text_dtype=torch.bfloat16))
    cond = cured.embed(["a cat"])
    assert cond.tokens.isfinite().all()
    noisy = torch.zeros(1, *cured.latent_shape)
    assert cured.denoise(cured.net, noisy, cured.sample_time(torch.full((1,), 0.5)), cond).dtype == torch.float32


@pytest.mark.parametrize(("arch", "kind"), [("sd15", Backbone), ("sana", Sana)])
def test_an_autoencoder_that_overflows_in_half_precision_draws_no_black_images(tmp_path, arch, kind):
    shutil.copytree(ASSETS / arch, tmp_path / "model")
    file = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    held = load_file(file)
    held["decoder.conv_in.weight"] = torch.full_like(held["decoder.conv_in.weight"], 60_000)
    save_file(held, file, {"format": "pt"})
    half = kind(tmp_path / "model", torch.float16, CPU, Options(vae_dtype=torch.float16))
    latents = torch.ones(1, *half.latent_shape)
    with pytest.raises(NonFiniteError, match=r"decodes values .* in torch.float16: set model.vae_dtype=float32"):
        half.decode(latents)
    with pytest.raises(NonFiniteError, match="the net draws values that are not finite"):
        half.decode(latents * float("nan"))
    cured = kind(tmp_path / "model", torch.float16, CPU, Options(vae_dtype=torch.float32))
    assert cured.decode(latents).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("dtype", ["source", "bfloat16", None])
def test_the_export_has_the_dtype_of_its_key(tmp_path, dtype):
    keys = [] if dtype is None else [f"model.export_dtype={dtype}", "model.text_dtype=bfloat16"]
    run = tmp_path / "run"
    sculpt("unlearn", str(CONFIG), *TINY_RUN, "evaluate.enabled=false", *keys, f"run.folder={run}")
    for part in PARTS:
        stored = {entry.name: entry.dtype for entry in stored_entries(ASSETS / "sd15" / part)}
        expected = stored if dtype == "source" else dict.fromkeys(stored, getattr(torch, dtype or "float32"))
        assert {entry.name: entry.dtype for entry in stored_entries(run / "model" / part)} == expected


def test_null_dtypes_decide_nothing_and_wrong_ones_are_refused():
    keys = deciding_keys({"model": {"dtype": "float32", "text_dtype": None, "vae_dtype": None, "export_dtype": None}})
    assert keys == {"model.dtype": "float32"}
    for key in ("text_dtype", "vae_dtype", "export_dtype"):
        with pytest.raises(ConfigError, match=f"model.{key}=half: choose one of float32, .*null"):
            load_config(CONFIG, [f"model.{key}=half"])
