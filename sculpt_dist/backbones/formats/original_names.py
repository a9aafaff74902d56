"""The names of a model's tensors in Stability's original layout (`ldm` for SD 1.x, `sgm` for SDXL), from its config.

They are those of the released v1-5-pruned-emaonly.safetensors and sd_xl_base_1.0.safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sculpt_dist.backbones.io.folders import empty_component, read_json
from sculpt_dist.backbones.parts.components import model_class
from sculpt_dist.core.errors import ModelError

PIPELINES = {"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl"}
KINDS = {
    "unet": "diffusers.UNet2DConditionModel",
    "vae": "diffusers.AutoencoderKL",
    "text_encoder": "transformers.CLIPTextModel",
    "text_encoder_2": "transformers.CLIPTextModelWithProjection",
}
UNET, VAE = "model.diffusion_model.", "first_stage_model."
PREFIXES = {  # of each component's tensors, in a single file
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
OLD_ATTENTION = {  # names in folders from before diffusers 0.17
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
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
    """One tensor of a single file, and the tensors of the diffusers folder that it consists of."""

    name: str
    shape: Shape
    sources: tuple[str, ...]  # several, all of one shape, are stacked along the first axis, in this order
    change: str = ""  # "transposed", or "conv": [C, C] in the folder is [C, C, 1, 1] in the file

    @property
    def source_shape(self) -> Shape:
        """The shape of each source."""
        shape = self.shape
        if self.change == "conv":
            shape = shape[:2]
        elif self.change == "transposed":
            shape = shape[::-1]
        return (shape[0] // len(self.sources), *shape[1:])


def looks_like(names: Iterable[str]) -> str:
    """The kind of file that has tensors of these names: "sd15", "sdxl", "sd2", "lora" or "unknown"."""
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
    """The content of a json file of the pipeline. Raises ModelError when it is missing or damaged."""
    if not file.is_file():
        raise ModelError(f"{file}: is missing; give a complete diffusers pipeline folder")
    return read_json(file)


def pipeline_kind(folder: Path) -> str:
    """The kind of a pipeline folder: "sd15" or "sdxl". Raises ModelError for any other."""
    name = settings(folder / "model_index.json").get("_class_name")
    if name not in PIPELINES:
        raise ModelError(f"{folder}: holds a {name}; single files are read and written for {' and '.join(PIPELINES)}")
    # 2.x differs from 1.x by the linear projections of its UNet, and OpenCLIP's activation.
    linear = settings(folder / "unet" / "config.json").get("use_linear_projection")
    if PIPELINES[name] == "sd15" and (
        linear or settings(folder / "text_encoder" / "config.json").get("hidden_act") == "gelu"
    ):
        raise ModelError(
            f"{folder}: holds a Stable Diffusion 2.x; single files are read and written for SD 1.x and SDXL"
        )
    return PIPELINES[name]


def originals(folder: Path, kind: str) -> dict[str, list[Original]]:
    """The tensors of a single file, by component, from the configs of a pipeline folder; `kind`: see `pipeline_kind`.

    Raises ModelError when a config is missing or describes a model that the original layout cannot hold.
    """
    return {part: _of_model(folder / part, prefix) for part, prefix in PREFIXES[kind].items()}


def unet_originals(folder: Path) -> dict[str, str]:
    """The UNet's tensors: name in the pipeline folder -> original name, without the prefix of a single file.

    Raises ModelError when its config is missing or describes a UNet that the original layout cannot hold.
    """
    return {entry.sources[0]: entry.name for entry in _of_model(folder / "unet", "")}


def plain_name(part: str, name: str) -> str:
    """The name in `originals` of a tensor that some version of diffusers or transformers stored as `name`."""
    if part == "vae" and (found := re.fullmatch(r"(.*\.attentions\.0)\.(query|key|value|proj_attn)\.(\w+)", name)):
        return f"{found[1]}.{OLD_ATTENTION[found[2]]}.{found[3]}"
    if part.startswith("text_encoder") and not name.startswith(("text_model.", "text_projection.")):
        return f"text_model.{name}"  # transformers 5 drops the prefix of a CLIPTextModel, and reads both
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
            f"{part}: {len(left)} tensors have no place in the original layout ({', '.join(left[:3])}); keep the "
            "folder as it is"
        )
    return [entry._replace(name=prefix + entry.name) for entry in found]


def _described(part: Path) -> tuple[dict[str, Any], dict[str, Shape]]:
    """(a model's config with its defaults, its tensors' shapes); the model is built without memory for its weights."""
    config, kind = settings(part / "config.json"), KINDS[part.name]
    expected = kind.rpartition(".")[2]
    diffusers_model = part.name in ("unet", "vae")
    if diffusers_model and config.get("_class_name") != expected:
        raise ModelError(
            f"{part / 'config.json'}: a {config.get('_class_name')} is no {expected}; give a pipeline that has one"
        )
    model = empty_component(model_class(kind), part.parent, part.name, torch.float32)
    config = dict(model.config) if diffusers_model else config
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
    """The original name of each block: layers are numbered consecutively over all levels, down and up separately."""
    down, up, layers = config["down_block_types"], config["up_block_types"], config["layers_per_block"]
    unknown = {*down, config["mid_block_type"], *up} - BLOCKS
    if unknown:
        raise ModelError(
            f"{part}: blocks of type {', '.join(map(str, unknown))} have no place in the original layout; keep the "
            "folder as it is"
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
        # Upsampling belongs to the level's last layer, while downsampling is a layer of its own.
        blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{1 + attends}.conv"
    return blocks


def _vae(config: dict[str, Any], shapes: dict[str, Shape]) -> list[Original]:
    found = []
    for name, shape in shapes.items():
        change = ""
        if match := re.fullmatch(
            r"(encoder|decoder)\.mid_block\.attentions\.0\.(group_norm|to_[qkv]|to_out\.0)\.(\w+)", name
        ):
            change = "conv" if len(shape) == 2 else ""
            new = f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
        elif match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", name):
            new = f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
        elif match := re.fullmatch(
            r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(resnets\.|(?:down|up)samplers\.0\.)(.+)", name
        ):
            # The decoder's levels are numbered by resolution: the first one to run has the highest number.
            level = int(match[2]) if match[1] == "encoder.down" else len(config["up_block_types"]) - 1 - int(match[2])
            new = f"{match[1]}.{level}.{match[3].replace('resnets', 'block').replace('samplers.0', 'sample')}{match[4]}"
        elif re.fullmatch(r"((en|de)coder\.conv_(in|out|norm_out)|(post_)?quant_conv)\.\w+", name):
            new = name.replace("conv_norm_out", "norm_out")
        else:
            continue
        found.append(
            Original(new.replace("conv_shortcut", "nin_shortcut"), (*shape, 1, 1) if change else shape, (name,), change)
        )
    return found


def _openclip(shapes: dict[str, Shape]) -> list[Original]:
    found = []
    for name, shape in shapes.items():
        match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(\w+)", name)
        if name in OPENCLIP_ENDS:
            if name == "text_projection.weight":
                found.append(Original(OPENCLIP_ENDS[name], shape[::-1], (name,), "transposed"))
            else:
                found.append(Original(OPENCLIP_ENDS[name], shape, (name,)))
        elif match and match[2] in OPENCLIP:
            found.append(Original(f"transformer.resblocks.{match[1]}.{OPENCLIP[match[2]]}.{match[3]}", shape, (name,)))
        elif match and match[2] == "self_attn.q_proj":
            stacked = tuple(name.replace("q_proj", letter + "_proj") for letter in "qkv")
            joined = f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"
            found.append(Original(joined, (3 * shape[0], *shape[1:]), stacked))
    return found
