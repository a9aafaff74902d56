"""Single files in the original layout: round trips, agreement with diffusers, names of released models, refusals."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from harness import PROJECT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sculpt_dist.backbones.formats.original import looks_like, read_single_file, write_single_file
from sculpt_dist.backbones.formats.original_names import UNET, VAE, originals, pipeline_kind, plain_name
from sculpt_dist.backbones.io.tensorfile import entries
from sculpt_dist.core.errors import ModelError
from sculpt_dist.core.tensorfile import Entry, write_tensors

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas" / "sd15"
SECOND = "conditioner.embedders.1.model."
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
    "norm_num_groups": 8,
    "cross_attention_dim": 96,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 48,
}
TINY_VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 16,
}
REAL_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}
REAL_UNET_XL = TINY_UNET | {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "norm_num_groups": 32,
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REAL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a pipeline folder, by component and name."""
    return {
        f"{part}/{plain_name(part, name)}": tensor
        for part in WEIGHTS
        for file in sorted((folder / part).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def pipeline_folder(folder: Path, kind: str, **configs: dict) -> Path:
    """A pipeline folder that holds only configs."""
    models = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    folder.mkdir(parents=True)
    for part, config in configs.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps({"_class_name": models.get(part)} | config))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A tiny SDXL; its first encoder is in half precision, as many are."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tokenizer")
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sdxl") / "pipeline"
    StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(**TINY_UNET),
        vae=AutoencoderKL(**TINY_VAE, layers_per_block=2),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(**text, hidden_size=32, intermediate_size=64, projection_dim=32)
        ).half(),
        text_encoder_2=CLIPTextModelWithProjection(
            CLIPTextConfig(**text, hidden_size=64, intermediate_size=96, projection_dim=48)
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def attending(tmp_path_factory):
    """The shipped SD 1.5 with attention in its VAE, a sharded UNet, an fp16 text encoder with older names."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = tmp_path_factory.mktemp("attending") / "pipeline"
    shutil.copytree(ASSETS, folder)
    for part in ("unet", "vae"):
        shutil.rmtree(folder / part)
    torch.manual_seed(1)
    AutoencoderKL(**TINY_VAE, layers_per_block=1).save_pretrained(folder / "vae")
    UNet2DConditionModel.from_pretrained(ASSETS / "unet", torch_dtype=torch.float16).save_pretrained(
        folder / "unet", max_shard_size="1MB"
    )
    plain = folder / "text_encoder" / "model.safetensors"
    held = {f"text_model.{name}": tensor for name, tensor in load_file(plain).items()}
    held["text_model.embeddings.position_ids"] = torch.arange(10)[None]
    save_file(held, plain.with_name("model.fp16.safetensors"))
    plain.unlink()
    return folder


@pytest.fixture(scope="module")
def written(sdxl, attending, tmp_path_factory):
    """The three pipelines, and the single file of each."""
    folder = tmp_path_factory.mktemp("written")
    made = {}
    for name, pipeline in {"sd15": ASSETS, "attending": attending, "sdxl": sdxl}.items():
        write_single_file(pipeline, folder / f"{name}.safetensors")
        made[name] = (pipeline, folder / f"{name}.safetensors")
    return made


@pytest.mark.parametrize("name", ["sd15", "attending", "sdxl"])
def test_a_round_trip_is_bit_equal(written, name, tmp_path):
    pipeline, file = written[name]
    read_single_file(file, pipeline, tmp_path / "new" / "back")
    expected = {key: tensor for key, tensor in weights(pipeline).items() if not key.endswith("position_ids")}
    assert same(weights(tmp_path / "new" / "back"), expected)
    assert [path.name for path in file.parent.iterdir() if path.name.startswith(".")] == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["back"]
    write_single_file(tmp_path / "new" / "back", tmp_path / "again.safetensors")
    assert same(load_file(tmp_path / "again.safetensors"), load_file(file))


@pytest.mark.parametrize("name", ["sd15", "attending", "sdxl"])
def test_diffusers_reads_the_file_as_it_reads_the_folder(written, name, tmp_path):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    pipeline, file = written[name]
    kind, parts = (
        (StableDiffusionXLPipeline, list(WEIGHTS)) if name == "sdxl" else (StableDiffusionPipeline, list(WEIGHTS)[:3])
    )
    theirs = kind.from_single_file(str(file), config=str(pipeline), local_files_only=True, torch_dtype=torch.float32)
    read_single_file(file, pipeline, tmp_path / "back")
    ours = kind.from_pretrained(tmp_path / "back", torch_dtype=torch.float32)
    stored = weights(pipeline)
    for part in parts:
        state = theirs.components[part].state_dict()
        assert same(state, ours.components[part].state_dict())
        assert same(
            {plain_name(part, key): value for key, value in state.items()},
            {
                key.partition("/")[2]: value.float()
                for key, value in stored.items()
                if key.startswith(f"{part}/") and "position_ids" not in key
            },
        )


def test_the_attending_pipeline_is_sharded_and_attends(attending):
    assert len(list((attending / "unet").glob("*-of-*.safetensors"))) > 1
    assert any("attentions" in key for key in weights(attending) if key.startswith("vae/"))


def test_the_read_folder_equals_the_template_except_for_the_safety_checker(written, tmp_path):
    pipeline, file = written["sd15"]
    template = tmp_path / "template"
    shutil.copytree(pipeline, template)
    for weight in template.rglob("*.safetensors"):
        weight.unlink()
    (template / "safety_checker").mkdir()
    index = json.loads((template / "model_index.json").read_text())
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (template / "model_index.json").write_text(json.dumps(index | checker))
    encoder = template / "text_encoder" / "config.json"
    encoder.write_text(json.dumps(json.loads(encoder.read_text()) | {"dtype": "float32"}))
    read_single_file(file, template, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "model_index.json").read_text()) == index
    names = {str(path.relative_to(pipeline)) for path in pipeline.rglob("*")}
    assert {str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*")} == names
    assert json.loads((tmp_path / "back" / "text_encoder" / "config.json").read_text())["dtype"] == "float16"
    for name in ("tokenizer/tokenizer.json", "scheduler/scheduler_config.json", "unet/config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (pipeline / name).read_bytes()


def test_extra_tensors_of_single_files_are_ignored(written, tmp_path):
    pipeline, file = written["sdxl"]
    held = load_file(file)
    held |= {
        name: torch.zeros(1)
        for name in ("alphas_cumprod", "betas", "sqrt_alphas_cumprod", "denoiser.sigmas", "model_ema.decay")
    }
    held |= {name: torch.zeros(2) for name in (f"{SECOND}logit_scale", f"{VAE}loss.logvar", f"{VAE}model_ema.decay")}
    held["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(10)[None]
    for name in [name for name in held if re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight", name)]:
        held[name] = held[name][:, :, 0, 0].clone()  # some tools write these kernels as matrices
    save_file(held, tmp_path / "full.safetensors")
    read_single_file(tmp_path / "full.safetensors", pipeline, tmp_path / "back")
    assert same(weights(tmp_path / "back"), weights(pipeline))


@pytest.mark.parametrize(
    "settings",
    [{}, {"prediction_type": "v_prediction"}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}],
    ids=str,
)
def test_v_prediction_of_sdxl_is_marked_in_the_file_and_detected_when_it_is_read(sdxl, tmp_path, settings):
    shutil.copytree(sdxl, tmp_path / "v")
    scheduler = Path("scheduler") / "scheduler_config.json"
    plain = json.loads((tmp_path / "v" / scheduler).read_text())
    (tmp_path / "v" / scheduler).write_text(json.dumps(plain | settings))
    write_single_file(tmp_path / "v", tmp_path / "v.safetensors")
    marks = {entry.name for entry in entries(tmp_path / "v.safetensors")} & {"v_pred", "ztsnr"}
    assert marks == ({"v_pred"} if settings else set()) | ({"ztsnr"} if len(settings) == 2 else set())
    read_single_file(tmp_path / "v.safetensors", sdxl, tmp_path / "back")  # the template predicts eps
    back = json.loads((tmp_path / "back" / scheduler).read_text())
    assert {name: back.get(name) for name in settings} == settings and (settings or back == plain)


def test_older_tensor_names_are_read(written, attending, tmp_path):
    """The VAE of a folder from before diffusers 0.17, and the text encoder of a file saved without `text_model.`."""
    _, file = written["attending"]
    old = tmp_path / "old"
    shutil.copytree(attending, old)
    weight = old / "vae" / "diffusion_pytorch_model.safetensors"
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    held = load_file(weight)
    for new, before in names.items():
        held = {name.replace(new, before): tensor for name, tensor in held.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in held
    save_file(held, weight)
    write_single_file(old, tmp_path / "old.safetensors")
    assert same(load_file(tmp_path / "old.safetensors"), load_file(file))
    bare = {
        name.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."): t
        for name, t in load_file(file).items()
    }
    save_file(bare, tmp_path / "bare.safetensors")
    read_single_file(tmp_path / "bare.safetensors", attending, tmp_path / "back")
    assert same(
        weights(tmp_path / "back"),
        {key: value for key, value in weights(attending).items() if "position_ids" not in key},
    )


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The released models' configs, and the names and shapes of their single files: {"sd15": ..., "sdxl": ...}."""
    folder = tmp_path_factory.mktemp("real")
    v1 = pipeline_folder(folder / "v1", "StableDiffusionPipeline", unet=REAL_UNET, vae=REAL_VAE, text_encoder=CLIP_L)
    xl_parts = {"unet": REAL_UNET_XL, "vae": REAL_VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G}
    xl = pipeline_folder(folder / "xl", "StableDiffusionXLPipeline", **xl_parts)
    return {pipeline_kind(path): originals(path, pipeline_kind(path)) for path in (v1, xl)}


def test_the_released_models_map_one_to_one(real):
    for kind, count in (("sd15", 686), ("sdxl", 1680)):
        assert len(real[kind]["unet"]) == count
        assert len(real[kind]["vae"]) == 248 and len(real[kind]["text_encoder"]) == 196
        every = [entry for part in real[kind].values() for entry in part]
        assert len({entry.name for entry in every}) == len(every)
        for part in real[kind].values():
            sources = [source for entry in part for source in entry.sources]
            assert len(set(sources)) == len(sources)
    # 517 in the diffusers folder; four of the six attention tensors per layer are not stacked
    assert sum(len(entry.sources) for entry in real["sdxl"]["text_encoder_2"]) == 517
    assert len(real["sdxl"]["text_encoder_2"]) == 517 - 4 * 32


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("sd15", f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight", (640, 768)),
        ("sd15", f"{UNET}input_blocks.1.1.proj_in.weight", (320, 320, 1, 1)),
        ("sd15", f"{UNET}input_blocks.3.0.op.weight", (320, 320, 3, 3)),
        ("sd15", f"{UNET}output_blocks.2.1.conv.weight", (1280, 1280, 3, 3)),
        ("sd15", f"{UNET}output_blocks.5.2.conv.weight", (1280, 1280, 3, 3)),
        ("sd15", f"{UNET}output_blocks.11.0.skip_connection.weight", (320, 640, 1, 1)),
        ("sd15", f"{UNET}middle_block.1.transformer_blocks.0.ff.net.0.proj.weight", (10240, 1280)),
        ("sd15", f"{UNET}out.2.weight", (4, 320, 3, 3)),
        ("sd15", f"{VAE}decoder.up.3.block.0.conv1.weight", (512, 512, 3, 3)),
        ("sd15", f"{VAE}decoder.up.0.block.0.nin_shortcut.weight", (128, 256, 1, 1)),
        ("sd15", f"{VAE}encoder.mid.attn_1.q.weight", (512, 512, 1, 1)),
        ("sd15", f"{VAE}encoder.down.2.downsample.conv.weight", (512, 512, 3, 3)),
        ("sd15", f"{VAE}post_quant_conv.weight", (4, 4, 1, 1)),
        ("sd15", "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight", (77, 768)),
        ("sdxl", f"{UNET}label_emb.0.0.weight", (1280, 2816)),
        ("sdxl", f"{UNET}output_blocks.2.2.conv.weight", (1280, 1280, 3, 3)),
        ("sdxl", f"{UNET}input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight", (1280, 2048)),
        ("sdxl", f"{UNET}input_blocks.4.1.proj_in.weight", (640, 640)),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc2.weight", (768, 3072)),
        ("sdxl", f"{SECOND}transformer.resblocks.31.attn.in_proj_weight", (3840, 1280)),
        ("sdxl", f"{SECOND}transformer.resblocks.9.mlp.c_proj.bias", (1280,)),
        ("sdxl", f"{SECOND}positional_embedding", (77, 1280)),
        ("sdxl", f"{SECOND}token_embedding.weight", (49408, 1280)),
        ("sdxl", f"{SECOND}text_projection", (1280, 1280)),
    ],
)
def test_released_files_hold_this_name_and_shape(real, kind, name, shape):
    assert {entry.name: entry.shape for part in real[kind].values() for entry in part}[name] == shape


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_diffusers_converts_the_released_names_the_same_way(real, kind):
    """diffusers' own conversion, at full size on the meta device, gives each tensor the name it has in the folder."""
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        infer_diffusers_model_type,
    )

    every = {entry.name: torch.empty(entry.shape, device="meta") for part in real[kind].values() for entry in part}
    assert infer_diffusers_model_type(every) == {"sd15": "v1", "sdxl": "xl_base"}[kind]
    unet = {entry.name: torch.empty(entry.shape, device="meta") for entry in real[kind]["unet"]}
    config = {"layers_per_block": 2, "addition_embed_type": "text_time" if kind == "sdxl" else None}
    converted = convert_ldm_unet_checkpoint(dict(unet), config)
    assert len(converted) == len(unet) and all(
        converted[entry.sources[0]] is unet[entry.name] for entry in real[kind]["unet"]
    )
    vae = {entry.name: torch.full(entry.shape[:1], i) for i, entry in enumerate(real[kind]["vae"])}
    converted = convert_ldm_vae_checkpoint(dict(vae), REAL_VAE)
    assert len(converted) == len(vae) and all(
        torch.equal(converted[entry.sources[0]], vae[entry.name]) for entry in real[kind]["vae"]
    )


def test_levels_may_differ_in_their_number_of_layers(tmp_path):
    """Lists in the config describe the down blocks; the up blocks use them in reverse, each with one layer more."""
    config = TINY_UNET | {"layers_per_block": (1, 2, 3), "transformer_layers_per_block": (1, 2, 3)}
    parts = {"unet": config, "vae": TINY_VAE | {"mid_block_add_attention": False, "use_quant_conv": False}}
    folder = pipeline_folder(
        tmp_path / "odd", "StableDiffusionXLPipeline", **parts, text_encoder=CLIP_L, text_encoder_2=CLIP_G
    )
    found = originals(folder, "sdxl")
    where = {entry.sources[0]: entry.name.removeprefix(UNET) for entry in found["unet"]}
    assert len(set(where.values())) == len(where)
    assert where["down_blocks.1.resnets.0.conv1.weight"] == "input_blocks.3.0.in_layers.2.weight"
    assert (
        where["down_blocks.2.attentions.2.transformer_blocks.2.norm1.bias"]
        == "input_blocks.8.1.transformer_blocks.2.norm1.bias"
    )
    assert (
        where["up_blocks.0.attentions.3.transformer_blocks.2.norm1.bias"]
        == "output_blocks.3.1.transformer_blocks.2.norm1.bias"
    )
    assert where["up_blocks.0.upsamplers.0.conv.bias"] == "output_blocks.3.2.conv.bias"
    assert where["up_blocks.2.resnets.1.conv2.bias"] == "output_blocks.8.0.out_layers.3.bias"
    names = {entry.name for entry in found["vae"]}
    assert f"{VAE}encoder.mid.block_2.conv1.weight" in names and f"{VAE}post_quant_conv.bias" in names
    assert not any(".attn_1." in name or name.startswith(f"{VAE}quant_conv") for name in names)


def refuse(match: str, file: Path, template: Path, folder: Path) -> str:
    """The error for reading this file; it names the file, and nothing is left behind."""
    with pytest.raises(ModelError, match=match) as caught:
        read_single_file(file, template, folder)
    assert str(file) in str(caught.value)
    assert not folder.exists() and not list(folder.parent.glob(f".{folder.name}.*"))
    return str(caught.value)


def test_a_missing_or_cut_file_is_refused(written, tmp_path):
    pipeline, file = written["sd15"]
    refuse("no such file", tmp_path / "none.safetensors", pipeline, tmp_path / "back")
    refuse("is a folder", tmp_path, pipeline, tmp_path / "back")
    whole = file.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length, match in (
        (len(whole) - 1, "is cut short: it has .* bytes"),
        (5000, "cut short, within its header"),
        (4, "no safetensors"),
    ):
        cut.write_bytes(whole[:length])
        refuse(match, cut, pipeline, tmp_path / "back")
    cut.write_bytes(whole + b"more")
    refuse("is damaged", cut, pipeline, tmp_path / "back")
    cut.write_bytes(whole[:8] + whole[8:].replace(b'"F16"', b'"F99"', 1))
    refuse("header is damaged .*F99", cut, pipeline, tmp_path / "back")
    cut.write_bytes(b"<!DOCTYPE html><html>404</html>")
    refuse("is no safetensors file", cut, pipeline, tmp_path / "back")


@pytest.mark.parametrize("name", ["model.ckpt", "it's.pt", "renamed.safetensors"])
def test_a_pickle_is_refused_with_a_command_that_converts_it(written, tmp_path, name):
    pipeline, file = written["sd15"]
    pickled = tmp_path / name
    torch.save({"state_dict": load_file(file), "epoch": 3}, pickled)
    message = refuse("holds pickled weights", pickled, pipeline, tmp_path / "back")
    if name != "renamed.safetensors":
        python, option, code = shlex.split(message.partition("convert it with: ")[2])
        assert (python, option) == ("python", "-c")
        exec(code, {})  # noqa: S102
        assert same(load_file(pickled.with_suffix(".safetensors")), load_file(file))


def test_a_file_of_another_kind_is_refused(written, tmp_path):
    refuse("looks like SDXL .* is Stable Diffusion 1.x", written["sdxl"][1], ASSETS, tmp_path / "back")
    refuse("looks like Stable Diffusion 1.x .* is SDXL", written["sd15"][1], written["sdxl"][0], tmp_path / "back")
    other = tmp_path / "other.safetensors"
    for name, match in {
        "cond_stage_model.model.ln_final.bias": "Stable Diffusion 2.x",
        "lora_unet_down_blocks_0.lora_up.weight": "a LoRA",
        "transformer.blocks.0.weight": "no complete Stable Diffusion",
    }.items():
        save_file({name: torch.zeros(2)}, other)
        refuse(f"looks like {match} .*{re.escape(name)}", other, ASSETS, tmp_path / "back")


def test_the_kind_of_a_file_is_recognised_by_its_names():
    assert (
        looks_like(["conditioner.embedders.1.model.ln_final.bias", "conditioner.embedders.0.transformer.x"]) == "sdxl"
    )
    assert looks_like(iter(["betas", "cond_stage_model.transformer.text_model.final_layer_norm.bias"])) == "sd15"
    assert looks_like(["cond_stage_model.model.ln_final.bias"]) == "sd2"
    assert (
        looks_like(["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"])
        == looks_like(["x.lora.down.weight"])
        == "lora"
    )
    assert (
        looks_like([]) == looks_like(["conditioner.embedders.0.model.ln_final.bias"]) == "unknown"
    )  # the second is SDXL's refiner


def test_missing_extra_and_misshapen_tensors_are_refused(written, tmp_path):
    pipeline, file = written["sdxl"]
    held, odd = load_file(file), tmp_path / "odd.safetensors"
    lost = f"{SECOND}transformer.resblocks.1.attn.in_proj_weight"
    save_file({name: tensor for name, tensor in held.items() if name != lost and "label_emb" not in name}, odd)
    message = refuse("lacks 5 tensors", odd, pipeline, tmp_path / "back")
    assert "model.diffusion_model.label_emb.0.0.weight" in message and message.count("label_emb") == 3
    save_file(held | {f"{UNET}input_blocks.20.0.op.bias": torch.zeros(3)}, odd)
    refuse("holds 1 tensors beyond .*input_blocks.20.0.op.bias", odd, pipeline, tmp_path / "back")
    save_file(held | {lost: held[lost][:-3].clone()}, odd)
    refuse(r"in_proj_weight is \(189, 64\), .* asks for \(192, 64\)", odd, pipeline, tmp_path / "back")


def test_folders_that_cannot_be_used_are_refused(written, tmp_path):
    pipeline, file = written["sd15"]
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="there: exists already"):
        read_single_file(file, pipeline, tmp_path / "there")
    with pytest.raises(ModelError, match="model_index.json: is missing"):
        read_single_file(file, tmp_path / "there", tmp_path / "back")
    shutil.copytree(pipeline, tmp_path / "lacking", ignore=shutil.ignore_patterns("scheduler"))
    with pytest.raises(ModelError, match="scheduler: the template lacks this component"):
        read_single_file(file, tmp_path / "lacking", tmp_path / "back")
    index = tmp_path / "lacking" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": [None, None]}))
    with pytest.raises(ModelError, match="model_index.json: does not name vae"):
        read_single_file(file, tmp_path / "lacking", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lacking", "there"]
    other = pipeline_folder(tmp_path / "other", "FluxPipeline")
    with pytest.raises(ModelError, match="holds a FluxPipeline"):
        write_single_file(other, tmp_path / "x.safetensors")
    second = pipeline_folder(
        tmp_path / "v2", "StableDiffusionPipeline", unet={"use_linear_projection": True}, text_encoder=CLIP_L
    )
    with pytest.raises(ModelError, match="Stable Diffusion 2.x"):
        write_single_file(second, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="let it end in .safetensors"):
        write_single_file(pipeline, tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mid_block_type": "UNetMidBlock2D"}, "UNetMidBlock2D have no place"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D have no place"),
        ({"class_embed_type": "timestep"}, "4 tensors have no place in the original layout .class_embedding"),
        ({"block_out_channels": [3, 5]}, "config.json: no UNet2DConditionModel can be built from it"),
        ({"_class_name": "SD3Transformer2DModel"}, "is no UNet2DConditionModel"),
        ({"block_out_channels": [56, 88]}, r"\d+ weights do not fit its config: .* is \(.*\), not \("),
    ],
)
def test_a_unet_without_an_original_layout_is_refused(tmp_path, change, match):
    shutil.copytree(ASSETS, tmp_path / "odd")
    config = tmp_path / "odd" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ModelError, match=match):
        write_single_file(tmp_path / "odd", tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_duplicate_weights_and_weights_that_cannot_be_stacked_are_refused(written, tmp_path):
    pipeline, _ = written["sdxl"]
    shutil.copytree(pipeline, tmp_path / "odd")
    weight = tmp_path / "odd" / "text_encoder_2" / "model.safetensors"
    held = load_file(weight)
    name = "text_model.encoder.layers.0.self_attn.k_proj.weight"
    save_file(held | {name: held[name].half()}, weight)
    with pytest.raises(ModelError, match="mixed dtypes .*float16.* cannot be stacked into .*in_proj_weight"):
        write_single_file(tmp_path / "odd", tmp_path / "x.safetensors")
    shards = [weight.with_name(f"model-0000{i}-of-00002.safetensors") for i in (1, 2)]
    for shard in shards:
        shutil.copy(weight, shard)
    index = weight.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {str(i): shard.name for i, shard in enumerate(shards)}}))
    with pytest.raises(ModelError, match="is also in model-00001-of-00002.safetensors"):
        write_single_file(tmp_path / "odd", tmp_path / "x.safetensors")
    for file in (weight, index, *shards):
        file.unlink()
    with pytest.raises(ModelError, match="text_encoder_2: no .safetensors weights"):
        write_single_file(tmp_path / "odd", tmp_path / "x.safetensors")


DTYPES = (
    torch.bool,
    torch.float8_e4m3fn,
    torch.uint8,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.float32,
    torch.float64,
)


def test_the_writer_agrees_with_the_safetensors_library(tmp_path):
    tensors = {
        f"{i}": (torch.arange(i * 3) % 2).to(dtype).reshape(i, 3) for i, dtype in enumerate(DTYPES)
    }  # the first is empty
    tensors |= {"scalar": torch.tensor(2.5), "transposed": torch.arange(6.0).reshape(2, 3).T}
    planned = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_tensors(tmp_path / "ours.safetensors", planned, tensors.items(), {"format": "pt", "note": "\u00fc"})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs.safetensors")
    assert same(load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors"))
    with safe_open(tmp_path / "ours.safetensors", "pt") as content:
        assert content.metadata() == {"format": "pt", "note": "\u00fc"}
    raw = (tmp_path / "ours.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    for file in ("ours.safetensors", "theirs.safetensors"):
        assert sorted(map(str, entries(tmp_path / file))) == sorted(map(str, planned))
    write_tensors(tmp_path / "none.safetensors", [], [])
    assert entries(tmp_path / "none.safetensors") == [] and load_file(tmp_path / "none.safetensors") == {}


def test_the_writer_holds_one_tensor_at_a_time(tmp_path):
    alive: list[weakref.ref] = []

    def stream():
        for i in range(5):
            assert all(reference() is None for reference in alive)
            tensor = torch.full((4,), float(i))
            alive.append(weakref.ref(tensor))
            yield f"{i}", tensor
            del tensor

    write_tensors(tmp_path / "x.safetensors", [Entry(f"{i}", torch.float32, (4,)) for i in range(5)], stream())
    assert load_file(tmp_path / "x.safetensors")["3"].tolist() == [3.0] * 4


@pytest.mark.parametrize(
    "arriving",
    [
        [("a", torch.zeros(2))],
        [("a", torch.zeros(2)), ("a", torch.zeros(2)), ("b", torch.zeros(3))],
        [("a", torch.zeros(2)), ("b", torch.zeros(4))],
        [("a", torch.zeros(2)), ("b", torch.zeros(3).half())],
        [("a", torch.zeros(2)), ("b", torch.zeros(3)), ("c", torch.zeros(1))],
    ],
    ids=["too few", "twice", "shape", "dtype", "too many"],
)
def test_the_writer_keeps_to_its_plan_or_leaves_the_file_as_it_was(tmp_path, arriving):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"before")
    with pytest.raises(ValueError, match="x.safetensors"):
        write_tensors(file, [Entry("a", torch.float32, (2,)), Entry("b", torch.float32, (3,))], arriving)
    assert file.read_bytes() == b"before" and [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    with pytest.raises(ValueError, match="twice"):
        write_tensors(file, [Entry("a", torch.float32, (2,))] * 2, arriving)
