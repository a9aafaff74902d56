"""Pipeline folders, checked before anything is loaded; only settings and safetensors headers are read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from sculpt_dist.backbones.io.folders import (
    component_config,
    has_weights,
    is_named,
    pipeline_index,
    read_json,
    stored_entries,
    stored_weights,
    weight_files,
    weight_indices,
)
from sculpt_dist.backbones.io.tensorfile import entries, pickled
from sculpt_dist.core.errors import ModelError


def check_folder(folder: Path, pipeline_class: str, classes: Mapping[str, str], settings_only: bool = False) -> None:
    """Raises ModelError when the folder holds another pipeline, or a component is missing or visibly damaged.

    `classes`: the used components, subfolder -> class name. `settings_only`: components may lack their weights.
    """
    index = pipeline_index(folder, pipeline_class)
    for part in folder.iterdir():
        if is_named(index, part.name) and part.name not in classes and (part / "config.json").is_file():
            _refuse_pickles(part)  # an unused component too: exports copy it
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in classes if name.startswith("text_encoder")]
    for name in (*classes, *tokenizers, "scheduler"):
        if not is_named(index, name):
            raise ModelError(
                f"{folder / 'model_index.json'}: {name} is {json.dumps(index.get(name))}, so an export could not be "
                "loaded; it names a library and a class: fetch it again"
            )
    for name, expected in classes.items():
        part = folder / name
        if not (part / "config.json").is_file():
            raise ModelError(f"{part}: the pipeline lacks this component (no config.json)")
        found = component_config(folder, name).get("_class_name", expected)  # transformers' settings lack this key
        if found != expected:
            raise ModelError(f"{part}: holds a {found}, not a {expected}: it belongs to another kind of model")
        _refuse_pickles(part)
        if not has_weights(part):
            if settings_only:
                continue
            files = ", ".join(sorted(path.name for path in part.iterdir()))
            raise ModelError(f"{part}: no .safetensors weights (found {files}): fetch the component again")
        _check_index(part)
        _check_dtypes(part)


def _refuse_pickles(part: Path) -> None:
    """Raises ModelError when a component's weights are pickled, and there are no others."""
    if not has_weights(part):
        for file in sorted(part.glob("*.bin")):
            raise pickled(file)


def _check_index(part: Path) -> None:
    """Raises ModelError when the shards differ from their index; diffusers would not notice."""
    for index in weight_indices(part):
        promised = read_json(index)["weight_map"]
        held = {entry.name: file.name for file in weight_files(part) for entry in entries(file)}
        wrong = sorted(name for name in {*promised, *held} if promised.get(name) != held.get(name))
        if wrong:
            first = wrong[0]
            place = f"is in {held[first]}" if first in held else "is in none of the shards"
            named = f"is listed under {promised[first]}" if first in promised else "is not listed"
            raise ModelError(
                f"{index}: {len(wrong)} weights are not where it says, first {first}, which {named} and {place}: "
                "fetch both again"
            )


def check_finite(folder: Path, names: Iterable[str]) -> None:
    """Read the stored weights of components. Raises ModelError for a value that is NaN or infinite."""
    for name in names:
        for tensor_name, tensor in stored_weights(folder, name):
            # float8 has no isfinite of its own
            if tensor.is_floating_point() and not tensor.to(torch.float32).isfinite().all():
                raise ModelError(
                    f"{folder / name}: {tensor_name} holds values that are not finite; the checkpoint is damaged"
                )


def _check_dtypes(part: Path) -> None:
    """Raises ModelError for integers as weights, and for several float dtypes: such a component is one of two."""
    by_dtype: dict[torch.dtype, list[str]] = {}
    for entry in stored_entries(part):
        if entry.dtype.is_floating_point:
            by_dtype.setdefault(entry.dtype, []).append(entry.name)
        elif entry.name.endswith((".weight", ".bias")):  # CLIP's position_ids are integers rightly
            raise ModelError(
                f"{part}: {entry.name} is stored as {str(entry.dtype).removeprefix('torch.')}: quantised or damaged "
                "weights are not read; give the checkpoint in float32, bfloat16 or float16"
            )
    if len(by_dtype) > 1:
        found = "; ".join(
            f"{len(names)} in {str(dtype).removeprefix('torch.')} ({names[0]}, ...)"
            for dtype, names in by_dtype.items()
        )
        raise ModelError(
            f"{part}: its weights have mixed dtypes, {found}: save it in one, pipeline.to(dtype).save_pretrained(...)"
        )
