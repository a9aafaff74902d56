"""A fitted guard as a folder: `guard.safetensors` holds what was fitted, `guard.json` says what it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from sculpt_dist.config.load import merge_section
from sculpt_dist.core.errors import ModelError, RunFolderError
from sculpt_dist.core.files import file_sha256, make_folder, read_object, write_record
from sculpt_dist.core.plugins import plugin
from sculpt_dist.core.tensorfile import Entry, write_tensors
from sculpt_dist.guards.base import Guard

GUARD = "guard"  # the subfolder of a guarded model
ABOUT, TENSORS = "guard.json", "guard.safetensors"
SIZES = (  # settings of a denoiser that decide whether what was fitted fits
    "in_channels out_channels block_out_channels layers_per_block transformer_layers_per_block cross_attention_dim "
    "caption_channels num_layers num_attention_heads attention_head_dim addition_embed_type"
).split()
REMEDY = "write the guard again, or fetch the folder again"


@dataclass(frozen=True)
class Fitted:
    """A guard with what was fitted, and a description of both."""

    guard: Guard
    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]


def net_sizes(net: Any) -> dict[str, Any]:
    """The class of a denoiser, and its settings that decide which guards fit."""
    settings = {name: net.config[name] for name in SIZES if name in net.config}
    found: dict[str, Any] = json.loads(json.dumps({"class": type(net).__name__, **settings}))
    return found


def write_guard(folder: Path, guard: Guard, tensors: Mapping[str, Tensor], net: Any, about: Mapping[str, Any]) -> None:
    """Write a guard that was fitted to `net`; `about`: what else guard.json shall say. The same input, the same bytes.

    Raises WriteError when the disk refuses.
    """
    make_folder(folder)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    planned = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()]
    checksum = write_tensors(folder / TENSORS, planned, kept.items())
    content = {
        "options": asdict(guard.config),
        "net": net_sizes(net),
        "tensors": checksum,
        "version": version("sculpt-dist"),
        **about,
    }
    write_record(folder / ABOUT, content)


def read_guard(folder: Path) -> Fitted:
    """Read a guard, and compare it with its checksums.

    Raises ModelError for a folder that is none, or damaged, and ConfigError for a guard or option that is unknown here.
    """
    if not (folder / ABOUT).is_file() or not (folder / TENSORS).is_file():
        raise ModelError(f"{folder}: is no guard (it has no {ABOUT} with {TENSORS}): give the folder of a guard")
    try:
        about = read_object(folder / ABOUT, REMEDY, ("options", "net", "tensors"))
    except RunFolderError as error:
        raise ModelError(str(error)) from error
    if file_sha256(folder / TENSORS) != about["tensors"]:
        raise ModelError(f"{folder / TENSORS} is damaged (it differs from the checksum in {ABOUT}): {REMEDY}")
    options = about["options"]
    if not isinstance(options, dict) or not isinstance(about["net"], dict):
        raise ModelError(f"{folder / ABOUT} is damaged (its options or net are no settings): {REMEDY}")
    module = plugin("sculpt_dist.guards", str(options.get("name")), f"{folder / ABOUT}: name")
    guard = module.Method(merge_section(module.Config, options, str(folder / ABOUT)))
    return Fitted(guard, load_file(folder / TENSORS), about)


def check_net(fitted: Fitted, net: Any) -> None:
    """Raises ModelError where a guard was fitted to a denoiser of another class or size."""
    ours, wanted = net_sizes(net), fitted.about["net"]
    for name in wanted.keys() | ours.keys():
        if ours.get(name) != wanted.get(name):
            raise ModelError(
                f"the guard {fitted.about['options']['name']} was fitted to a denoiser with {name} {wanted.get(name)}, "
                f"this one has {ours.get(name)}: fit the guard to this model"
            )
