"""Reads models of transformers from local folders: nothing is downloaded, no pickle is read, no code in them runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sculpt_dist.core.errors import ModelError

Loaded = TypeVar("Loaded")
Model = TypeVar("Model", bound=nn.Module)


def open_folder(where: str | Path, files: Sequence[str]) -> Path:
    """A model folder that holds these files. Raises ModelError when the folder or one of the files is missing."""
    folder = Path(where).expanduser()
    if not str(where) or not folder.is_dir():
        raise ModelError(
            f"{str(where)!r}: no such model folder: give a local folder written by transformers' save_pretrained; "
            "nothing is downloaded"
        )
    for file in files:
        if not (folder / file).is_file():
            raise ModelError(
                f"{folder}: lacks {file}: save the model and its processor into this folder with save_pretrained"
            )
    return folder


def read_part(from_pretrained: Callable[..., Loaded], folder: Path, **options: Any) -> Loaded:
    """Call a `from_pretrained` of transformers on local files only.

    Raises ModelError when the files are damaged or hold another kind of model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    # what transformers raises for damaged or unsuitable files
    errors = (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        ImportError,
        SafetensorError,
        StrictDataclassError,
    )
    try:
        return from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except errors as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{folder}: transformers cannot load it ({type(error).__name__}: {reason}): copy it again"
        ) from error


def read_model(from_pretrained: Callable[..., Model], folder: Path) -> Model:
    """The model in a folder, in float32 and frozen, by its class's `from_pretrained`. Only safetensors are read.

    Raises ModelError, also for missing weights, which transformers would fill with random numbers.
    """
    _check_weight_files(folder)
    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    loaded: Any = read_part(from_pretrained, folder, **options)
    model: Model = loaded[0]
    report: dict[str, Any] = loaded[1]
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder}: lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]}: "
            "the folder holds another kind of model or only part of one; give the right folder"
        )
    return model.eval().requires_grad_(False)


def _check_weight_files(folder: Path) -> None:
    """Refuse everything but plain safetensors.

    With `use_safetensors`, transformers still reads a pickle that an index or the config names.
    """
    if not (folder / "model.safetensors").is_file():
        index = folder / "model.safetensors.index.json"
        if not index.is_file():
            raise ModelError(
                f"{folder}: lacks model.safetensors, the only weight file that is read: save the model again with "
                "save_pretrained"
            )
        weight_map = _read_json(index).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else [weight_map]
        others = [file for file in files if not str(file).endswith(".safetensors")]
        if others:
            raise ModelError(
                f"{index}: names {others[0]}, but only safetensors are read; save the model again with save_pretrained"
            )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder}: holds an adapter (adapter_config.json): merge it into the model and save the merged model"
        )
    if "transformers_weights" in _read_json(folder / "config.json"):
        raise ModelError(
            f"{folder}/config.json: names a weight file (transformers_weights): save the model again with "
            "save_pretrained"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ModelError(f"{file}: is not valid JSON ({error}): copy the folder again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds a {type(content).__name__}, expected an object: copy the folder again")
    return content
