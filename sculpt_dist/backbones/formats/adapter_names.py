"""The names of an adapter's tensors and its metadata, as diffusers and peft or kohya's trainer write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sculpt_dist.backbones.formats.original_names import unet_originals
from sculpt_dist.backbones.formats.stored_net import StoredNet
from sculpt_dist.backbones.io.folders import component_config

KOHYA = {  # kohya's name for the version of the base
    "StableDiffusionPipeline": "sd_v1",
    "StableDiffusionXLPipeline": "sdxl_base_v1-0",
}


def lora_keys(net: StoredNet, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Of B and A, as diffusers and peft name them; alpha is in the metadata."""
    modules = {name: f"{net.name}.{name.removesuffix('.weight')}" for name in names}
    return {name: (f"{module}.lora_B.weight", f"{module}.lora_A.weight") for name, module in modules.items()}


def peft_options(names: Sequence[str], rank: int) -> dict[str, Any]:
    """The arguments of peft.LoraConfig."""
    return {"r": rank, "lora_alpha": rank, "target_modules": [name.removesuffix(".weight") for name in names]}


def lora_about(net: StoredNet, options: dict[str, Any]) -> dict[str, str]:
    """The arguments of peft.LoraConfig, under the key and prefix of diffusers' save_lora_weights."""
    return {"lora_adapter_metadata": json.dumps({f"{net.name}.{key}": value for key, value in options.items()})}


def kohya_keys(net: StoredNet, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Of B, A and alpha."""
    originals = unet_originals(net.folder) if net.pipeline == "StableDiffusionXLPipeline" else {}
    ends = ("lora_up.weight", "lora_down.weight", "alpha")
    keys = {}
    for name in names:
        module = originals.get(name, name).removesuffix(".weight").replace(".", "_")
        keys[name] = tuple(f"lora_unet_{module}.{end}" for end in ends)
    return keys


def kohya_about(net: StoredNet, rank: int) -> dict[str, str]:
    """The metadata of kohya's trainer; A1111 lists a file under the version it finds here, and for no other model."""
    linear = component_config(net.folder, net.name).get("use_linear_projection")
    if net.pipeline == "StableDiffusionPipeline" and linear:
        version = {"ss_base_model_version": "sd_v2", "ss_v2": "True"}
    else:
        version = {"ss_base_model_version": KOHYA[net.pipeline]}
    return version | {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
