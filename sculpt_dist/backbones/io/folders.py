"""Diffusers pipeline folders, read: settings, tokenizers, schedulers, and weights with every tensor accounted for.

No pickle is ever read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sculpt_dist.backbones.io.tensorfile import entries
from sculpt_dist.core.errors import ModelError
from sculpt_dist.core.tensorfile import Entry

DENOISERS = ("unet", "transformer")  # diffusers' names for a pipeline's denoiser
CHECKSUMS = "CHECKSUMS"  # a file in the pipeline folders that we write
WEIGHT_NAME = re.compile(r"(\.\w+(-\d+-of-\d+)?|-\d+-of-\d+(\.\w+)?)?\.safetensors")  # after the stem
PLACES = ("*", "snapshots/*", "models--*/snapshots/*")  # of a pipeline in a folder around it, such as the hub's cache

# Settings


def read_json(file: Path) -> dict[str, Any]:
    """The object in a json file. Raises ModelError when there is none."""
    if file.exists() and not file.is_file():
        raise ModelError(f"{file}: is no regular file")  # a pipe would make the run wait for ever
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: is damaged, no readable json ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: is damaged, it holds a {type(content).__name__} in place of named settings")
    return content


def pipeline_index(folder: Path, expected: str | None = None) -> dict[str, Any]:
    """The folder's model_index.json. Raises ModelError when there is none, or it names another class than expected."""
    index = folder / "model_index.json"
    if not index.is_file():
        inside = [file.parent for pattern in PLACES for file in sorted(folder.glob(f"{pattern}/model_index.json"))]
        remedy = f"give {' or '.join(map(str, inside[:3]))}" if inside else "save one with pipeline.save_pretrained()"
        raise ModelError(f"{folder}: is no diffusers pipeline folder (no model_index.json); {remedy}")
    content = read_json(index)
    found = content.get("_class_name")
    if expected is not None and found != expected:
        remedy = "set model.arch to the kind of this model, if there is one"
        if "Inpaint" in str(found):
            remedy = "this is an inpainting model: give the text-to-image model that it was made from"
        raise ModelError(f"{folder}: holds a {found}, model.arch expects {expected}; {remedy}")
    return content


def is_named(index: Mapping[str, Any], name: str) -> bool:
    """Whether the pipeline of this model_index.json has a component of this name."""
    value = index.get(name)
    return isinstance(value, list) and value[:1] != [None]


def component_config(folder: Path, name: str) -> dict[str, Any]:
    """The settings of one component."""
    return read_json(folder / name / "config.json")


# Components


def load_component(kind: Any, folder: Path, name: str, dtype: torch.dtype) -> Any:
    """One model of a pipeline, of the class `kind`, frozen. Raises ModelError when weights and config do not fit."""
    quiet_libraries()
    part = folder / name
    try:
        model, report = kind.from_pretrained(
            part,
            dtype=dtype,
            variant=variant_of(part),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{part}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    wrong = [f"missing {key}" for key in sorted(report["missing_keys"]) if not key.endswith("position_ids")]
    wrong += [f"other shape {entry}" for entry in report["mismatched_keys"]]
    if name in DENOISERS:  # text encoders hold more tensors than are used
        wrong += [f"unknown {key}" for key in sorted(report["unexpected_keys"])]
    if wrong:
        raise ModelError(
            f"{part}: {len(wrong)} weights do not fit its config: {'; '.join(wrong[:3])}; the checkpoint is damaged or "
            "belongs to another model"
        )
    broken = [tensor_name for tensor_name, tensor in model.named_parameters() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(
            f"{part}: {len(broken)} weights hold values that are not finite ({broken[0]}, ...); the checkpoint is "
            "damaged"
        )
    return model.eval().requires_grad_(False)


def empty_component(kind: Any, folder: Path, name: str, dtype: torch.dtype) -> Any:
    """One model of a pipeline on the meta device, built from its settings. Raises ModelError when they do not fit."""
    from diffusers import ConfigMixin
    from huggingface_hub.errors import StrictDataclassError  # raised by transformers' settings

    quiet_libraries()
    settings = component_config(folder, name)
    try:
        with torch.device("meta"):
            if issubclass(kind, ConfigMixin):
                model = kind.from_config(settings)
            else:
                model = kind(kind.config_class.from_dict(settings))
    except (StrictDataclassError, ValueError, RuntimeError, TypeError, KeyError, IndexError) as error:
        fault = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{folder / name / 'config.json'}: no {kind.__name__} can be built from it: {fault}"
        ) from error
    return model.to(dtype).eval().requires_grad_(False)


def quiet_libraries() -> None:
    """Turn off the libraries' progress bars and hints; our own errors say what is wrong with a folder."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


@lru_cache(maxsize=8)
def load_tokenizer(folder: Path, name: str) -> Any:
    """A tokenizer of the pipeline, which takes no more tokens than its text encoder has positions for.

    No code of the folder is run. Raises ModelError when the tokenizer is missing, damaged, or needs such code.
    """
    from transformers import AutoTokenizer

    if not (folder / name).is_dir():
        raise ModelError(f"{folder / name}: the pipeline lacks this component")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder / name}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    encoder = folder / name.replace("tokenizer", "text_encoder") / "config.json"
    positions = read_json(encoder).get("max_position_embeddings") if encoder.is_file() else None
    if isinstance(positions, int):
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


# Weights


def has_weights(part: Path) -> bool:
    """Whether a component's folder holds safetensors, of any variant, that diffusers or transformers loads by name."""
    return bool(weight_indices(part) or _single_files(part))


def unloaded_files(part: Path) -> list[Path]:
    """Safetensors beside a component's weights that nothing loads, such as a backup, an adapter or an EMA copy."""
    return sorted({*part.glob("*.safetensors")} - {*_named_weights(part)})


def _named_weights(part: Path) -> list[Path]:
    """The safetensors whose names are those of a component's weights, of any variant, whole or in shards."""
    stem = _stem(part)
    return sorted(file for file in part.glob(f"{stem}*.safetensors") if WEIGHT_NAME.fullmatch(file.name[len(stem) :]))


def _single_files(part: Path) -> list[Path]:
    return [file for file in _named_weights(part) if "-of-" not in file.name]


def _stem(part: Path) -> str:
    """How diffusers' components name their weights, or those of transformers."""
    config = part / "config.json"
    settings = read_json(config) if config.is_file() else {}
    is_transformers = "_class_name" not in settings and ("architectures" in settings or "model_type" in settings)
    return "model" if is_transformers else "diffusion_pytorch_model"


def weight_files(part: Path) -> list[Path]:
    """The weight files that are loaded: those that an index lists, else the plain one, else that of the only variant.

    Raises ModelError when a file of the index is missing.
    """
    variant = variant_of(part)
    for index in weight_indices(part):
        weight_map = read_json(index).get("weight_map")
        named = sorted({part / str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        missing = [file.name for file in named if not file.is_file()]
        if missing or not named:
            raise ModelError(
                f"{index}: lists {len(missing)} shards that are missing ({', '.join(missing[:3])}): fetch them again"
            )
        return named
    return [file for file in _single_files(part) if file.name == f"{_stem(part)}{_dotted(variant)}.safetensors"]


def weight_indices(part: Path) -> list[Path]:
    """The index of the weights that are loaded, when they are in several files; at most one."""
    return [
        file for file in [part / f"{_stem(part)}.safetensors.index{_dotted(variant_of(part))}.json"] if file.is_file()
    ]


def variant_of(part: Path) -> str | None:
    """The variant ("fp16") whose weights are loaded; None where there are plain ones."""
    names = [file.name for file in _named_weights(part)]
    plain = not names or any(name.count(".") == 1 for name in names)
    return None if plain else names[0].split(".")[-2].split("-")[0]


def _dotted(variant: str | None) -> str:
    return f".{variant}" if variant else ""


def stored_entries(part: Path) -> list[Entry]:
    """A component's tensors, in the order of `stored_weights`; only headers are read.

    Raises ModelError for a damaged file.
    """
    return [entry for file in weight_files(part) for entry in entries(file)]


def stored_weights(folder: Path, name: str, wanted: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """A component's tensors (or those wanted) one at a time, in their stored dtype."""
    for file in weight_files(folder / name):
        yield from file_tensors(file, wanted)


def file_tensors(file: Path, wanted: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one safetensors file (or those wanted), one at a time, in the order of `entries`."""
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        for entry in entries(file):
            if wanted is None or entry.name in wanted:
                yield entry.name, content.get_tensor(entry.name)


def listed_checksums(folder: Path) -> dict[Path, str]:
    """The sha256 of the files that CHECKSUMS lists; empty without one."""
    file = folder / CHECKSUMS
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return {folder / name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}


def hub_checksum(file: Path) -> str | None:
    """The sha256 by which the hub's cache names a large file; None for others."""
    stored = file.resolve()
    return stored.name if re.fullmatch(".*/blobs/[0-9a-f]{64}", str(stored)) else None


def expected_checksums(folder: Path, files: Sequence[Path]) -> dict[Path, str]:
    """The known sha256 of files: from CHECKSUMS, or from the hub's cache, which names large files by it.

    Raises ModelError when CHECKSUMS lacks one of the files, or lists one that is gone.
    """
    known = {file: checksum for file in files if (checksum := hub_checksum(file)) is not None}
    if (folder / CHECKSUMS).is_file():
        named = listed_checksums(folder)
        for file in [*(f for f in named if not f.is_file()), *(f for f in files if f not in named)]:
            fault = "is not in CHECKSUMS" if file.is_file() else "is missing, but CHECKSUMS lists it"
            raise ModelError(
                f"{file}: {fault}: fetch the folder again, or remove CHECKSUMS if you have changed it on purpose"
            )
        known |= {file: named[file] for file in files if file in named}
    return known
