"""The names of a model's tensors in Stability's original layout (`ldm` for SD 1.x, `sgm` for SDXL), from the model's own config.

Original names, as the released v1-5-pruned-emaonly.safetensors and sd_xl_base_1.0.safetensors have them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sculpt_dist.backbones.io.folders import empty_component, read_json
from sculpt_dist.core.errors import ModelError

PIPELINES = {"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl"}
UNET, VAE = "model.diffusion_model.", "first_stage_model."
PREFIXES = {  # of each model of a pipeline, in a single file
    "sd15": {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.transformer."},
    "sdxl": {
        "unet": UNET,
        "vae": VAE,
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}  # as folders before diffusers 0.17 name them
OPENCLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPENCLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D"}
Shape = tuple[int, ...]


class Original(NamedTuple):
    """One tensor of a single file, and the tensors of the diffusers folder that it is made of."""

    name: str
    shape: Shape
    sources: tuple[str, ...]  # several are stacked along the first axis, in this order, all of one shape
    turn: str = ""  # "transposed", or "conv": [C, C] there is [C, C, 1, 1] here


def looks_like(names: Iterable[str]) -> str:
    """What kind of file has tensors of these names: "sd15", "sdxl", "sd2", "lora" or "unknown"."""
    held = tuple(names)
    marks = {
        "sdxl": "conditioner.embedders.1.",
        "sd15": "cond_stage_model.transformer.",
        "sd2": "cond_stage_model.model.",
    }
    for kind, mark in marks.items():
        if any(name.startswith(mark) for name in held):
            return kind
    return "lora" if any("lora_" in name or ".lora." in name for name in held) else "unknown"


def settings(file: Path) -> dict[str, Any]:
    """A json file of the pipeline. Raises ModelError when it is missing or damaged."""
    if not file.is_file():
        raise ModelError(f"{file}: is missing; give a complete diffusers pipeline folder")
    return read_json(file)


def pipeline_kind(folder: Path) -> str:
    """ "sd15" or "sdxl". Raises ModelError when the folder holds no pipeline of the two."""
    name = settings(folder / "model_index.json").get("_class_name")
    if name not in PIPELINES:
        raise ModelError(f"{folder}: holds a {name}; single files are read and written for {' and '.join(PIPELINES)}")
    # What tells 2.x from 1.x: its UNet's linear projections, and OpenCLIP's activation.
    linear = settings(folder / "unet" / "config.json").get("use_linear_projection")
    if PIPELINES[name] == "sd15" and (
        linear or settings(folder / "text_encoder" / "config.json").get("hidden_act") == "gelu"
    ):
        raise ModelError(
            f"{folder}: holds a Stable Diffusion 2.x; single files are read and written for SD 1.x and SDXL"
        )
    return PIPELINES[name]


def originals(folder: Path, kind: str) -> dict[str, list[Original]]:
    """What a single file of this pipeline folder holds, by model; from the folder's configs alone. `kind` as `pipeline_kind` gives it.

    Raises ModelError when a config is missing or describes a model that the original layout cannot hold.
    """
    return {part: _of_model(folder / part, prefix) for part, prefix in PREFIXES[kind].items()}


def unet_originals(folder: Path) -> dict[str, str]:
    """The original names of a pipeline's UNet's tensors, without the prefix of a single file, by their names in the folder.

    Raises ModelError when its config is missing or describes one that the original layout cannot hold.
    """
    return {entry.sources[0]: entry.name for entry in _of_model(folder / "unet", "")}


def plain_name(part: str, name: str) -> str:
    """The name that `originals` uses for a tensor stored as `name` by whichever version of diffusers or transformers."""
    if part == "vae" and (found := re.fullmatch(r"(.*\.attentions\.0)\.(query|key|value|proj_attn)\.(\w+)", name)):
        return f"{found[1]}.{OLD_ATTENTION[found[2]]}.{found[3]}"
    if part.startswith("text_encoder") and not name.startswith(("text_model.", "text_projection.")):
        return f"text_model.{name}"  # transformers 5 drops it from a CLIPTextModel, and reads both
    return name


def _of_model(part: Path, prefix: str) -> list[Original]:
    config, shapes = _described(part)
    if part.name == "unet":
        found = _unet(part, config, shapes)
    elif part.name == "vae":
        found = _vae(config, shapes)
    elif part.name == "text_encoder":
        found = [Original(name, shape, (name,)) for name, shape in shapes.items()]
    else:
        found = _openclip(shapes)
    left = sorted(set(shapes) - {source for entry in found for source in entry.sources})
    if left:
        raise ModelError(
            f"{part}: {len(left)} tensors have no place in the original layout ({', '.join(left[:3])}); keep the folder as it is"
        )
    return [entry._replace(name=prefix + entry.name) for entry in found]


def _described(part: Path) -> tuple[dict[str, Any], dict[str, Shape]]:
    """A model's config, with the defaults of what it leaves out, and its tensors' shapes; the model is built without memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kinds = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    kind, config = kinds[part.name], settings(part / "config.json")
    if part.name in ("unet", "vae") and config.get("_class_name") != kind.__name__:
        raise ModelError(
            f"{part / 'config.json'}: a {config.get('_class_name')} is no {kind.__name__}; give a pipeline that has one"
        )
    model = empty_component(kind, part.parent, part.name, torch.float32)
    config = dict(model.config) if part.name in ("unet", "vae") else config
    return config, {plain_name(part.name, name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _unet(part: Path, config: dict[str, Any], shapes: dict[str, Shape]) -> list[Original]:
    blocks = UNET_ENDS | _unet_blocks(part, config)
    found = []
    for name, shape in shapes.items():
        block, inner = name, ""
        while block and block not in blocks:
            block, _, last = block.rpartition(".")
            inner = f".{last}{inner}"
        if block:
            layer, _, leaf = inner[1:].rpartition(".")
            if ".resnets." in block:
                if layer not in RESNET:
                    continue
                inner = f".{RESNET[layer]}.{leaf}"
            found.append(Original(blocks[block] + inner, shape, (name,)))
    return found


def _unet_blocks(part: Path, config: dict[str, Any]) -> dict[str, str]:
    """Where each block of a UNet2DConditionModel lies: all layers of the way down are numbered through, and so are those of the way up."""
    down, up, layers = config["down_block_types"], config["up_block_types"], config["layers_per_block"]
    odd = {*down, config["mid_block_type"], *up} - BLOCKS
    if odd:
        raise ModelError(
            f"{part}: blocks of type {', '.join(map(str, odd))} have no place in the original layout; keep the folder as it is"
        )
    layers = [layers] * len(down) if isinstance(layers, int) else layers
    blocks = {
        f"mid_block.{name}": f"middle_block.{i}" for i, name in enumerate(("resnets.0", "attentions.0", "resnets.1"))
    }
    place = 1  # 0 is conv_in
    for level, kind in enumerate(down):
        for layer in range(layers[level]):
            blocks[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{place}.0"
            if kind.startswith("CrossAttn"):
                blocks[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{place}.1"
            place += 1
        blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"  # the last level has none
        place += 1
    place = 0
    for level, kind in enumerate(up):
        attends = kind.startswith("CrossAttn")
        for layer in range(layers[-1 - level] + 1):
            blocks[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{place}.0"
            if attends:
                blocks[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{place}.1"
            place += 1
        # The upsampling is part of the level's last layer; the downsampling was a layer of its own.
        blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{1 + attends}.conv"
    return blocks


def _vae(config: dict[str, Any], shapes: dict[str, Shape]) -> list[Original]:
    found = []
    for name, shape in shapes.items():
        turn = ""
        if match := re.fullmatch(
            r"(encoder|decoder)\.mid_block\.attentions\.0\.(group_norm|to_[qkv]|to_out\.0)\.(\w+)", name
        ):
            turn = "conv" if len(shape) == 2 else ""
            new = f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
        elif match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", name):
            new = f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
        elif match := re.fullmatch(
            r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(resnets\.|(?:down|up)samplers\.0\.)(.+)", name
        ):
            # The decoder's levels are counted by their resolution, so that the first one to run is the last.
            level = int(match[2]) if match[1] == "encoder.down" else len(config["up_block_types"]) - 1 - int(match[2])
            new = f"{match[1]}.{level}.{match[3].replace('resnets', 'block').replace('samplers.0', 'sample')}{match[4]}"
        elif re.fullmatch(r"((en|de)coder\.conv_(in|out|norm_out)|(post_)?quant_conv)\.\w+", name):
            new = name.replace("conv_norm_out", "norm_out")
        else:
            continue
        found.append(
            Original(new.replace("conv_shortcut", "nin_shortcut"), (*shape, 1, 1) if turn else shape, (name,), turn)
        )
    return found


def _openclip(shapes: dict[str, Shape]) -> list[Original]:
    found = []
    for name, shape in shapes.items():
        match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(\w+)", name)
        if name in OPENCLIP_ENDS:
            turned = name == "text_projection.weight"
            found.append(
                Original(OPENCLIP_ENDS[name], shape[::-1] if turned else shape, (name,), "transposed" if turned else "")
            )
        elif match and match[2] in OPENCLIP:
            found.append(Original(f"transformer.resblocks.{match[1]}.{OPENCLIP[match[2]]}.{match[3]}", shape, (name,)))
        elif match and match[2] == "self_attn.q_proj":
            stacked = tuple(name.replace("q_proj", letter + "_proj") for letter in "qkv")
            found.append(
                Original(
                    f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}", (3 * shape[0], *shape[1:]), stacked
                )
            )
    return found
