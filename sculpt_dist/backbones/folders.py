"""Diffusers pipeline folders: find, check, load strictly, and write. No pickle is ever read."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, Iterator, Type

import torch
from torch import Tensor, nn

from sculpt_dist.errors import ModelError

MAX_SHARD_BYTES = 5_000_000_000
COPIED = (".json", ".txt", ".model")  # of a component, beside its weights
STOCHASTIC = ("Ancestral", "SDE", "sde", "LCM", "TCD", "DDPM")


def find_folder(path: str | None, arch: str, revision: str | None) -> Path:
    """The local pipeline folder that `model.path` means: a folder, a hub id, or (null) the shipped canvas model of `arch`."""
    if path is None:
        shipped = Path(__file__).parent.parent / "assets" / "canvas" / arch
        if not (shipped / "model_index.json").is_file():
            raise ModelError(f"model.path is not set, and there is no shipped canvas model for model.arch={arch}")
        return shipped
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path.startswith((".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ModelError(f"model.path={path}: there is no such folder; give a diffusers pipeline folder or a hub id owner/name")
    return _from_hub(path, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(
            snapshot_download(name, revision=revision, etag_timeout=5, allow_patterns=["*.json", "*.txt", "*.safetensors", "*.model"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"model.path={name}: is no local folder, and the hub could not give it (network or name): {str(error).splitlines()[0]}"
        ) from error


def pipeline_index(folder: Path, expected: str) -> dict[str, Any]:
    """The folder's model_index.json. Raises ModelError when the folder holds no pipeline, or one of another class."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(f"{folder}: is no diffusers pipeline folder (no model_index.json); save one with pipeline.save_pretrained()")
    content = _read_json(index)
    if content.get("_class_name") != expected:
        raise ModelError(f"{folder}: holds a {content.get('_class_name')}, model.arch expects {expected}; set model.arch to match")
    return content


def load_component(kind: Type[nn.Module], folder: Path, name: str, dtype: torch.dtype) -> Any:
    """One model of a pipeline, with every weight present. Raises ModelError that names what is missing."""
    _quiet_libraries()
    part = folder / name
    if not (part / "config.json").is_file():
        raise ModelError(f"{part}: the pipeline lacks this component (no config.json)")
    if not any(part.glob("*.safetensors")):
        found = ", ".join(sorted(p.name for p in part.iterdir())) or "nothing"
        raise ModelError(f"{part}: no .safetensors weights (found {found}); pickled weights are not read: convert them with safetensors")
    try:
        model, report = kind.from_pretrained(
            part, dtype=dtype, variant=_variant(part), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{part}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    missing = sorted(key for key in report["missing_keys"] if not key.endswith("position_ids"))
    if missing or report["mismatched_keys"]:
        wrong = [f"missing {key}" for key in missing] + [f"other shape {entry}" for entry in report["mismatched_keys"]]
        raise ModelError(f"{part}: {len(wrong)} weights do not fit its config: {'; '.join(wrong[:3])}; the checkpoint is damaged or of another model")
    return model.eval().requires_grad_(False)


def _quiet_libraries() -> None:
    """Their bars and hints would bury ours; what is wrong with a folder we say ourselves."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def weight_files(part: Path) -> list[Path]:
    """The files of weights that are loaded: the plain ones, or those of one variant (model.fp16.safetensors) where only it is there."""
    files = sorted(part.glob("*.safetensors"))
    plain = [file for file in files if file.name.count(".") == 1]
    variant = _variant(part)
    return plain if variant is None else [file for file in files if f".{variant}" in file.name]


def _variant(part: Path) -> str | None:
    names = sorted(file.name for file in part.glob("*.safetensors"))
    plain = not names or any(name.count(".") == 1 for name in names)
    return None if plain else names[0].split(".")[-2].split("-")[0]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: is damaged, no readable json ({error})") from error


def load_scheduler(folder: Path) -> Any:
    """The pipeline's own scheduler class with its own configuration."""
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise ModelError(f"{file}: the pipeline lacks its scheduler")
    settings = _read_json(file)
    name = settings.get("_class_name", "")
    if any(word in name + str(settings.get("algorithm_type")) for word in STOCHASTIC):
        raise ModelError(
            f"{file}: {name} adds noise of its own, so equal seeds would not give equal images; save the pipeline with a deterministic "
            "scheduler such as DPMSolverMultistepScheduler"
        )
    scheduler = getattr(importlib.import_module("diffusers"), name, None)
    if scheduler is None or not name.endswith("Scheduler"):
        raise ModelError(f"{file}: _class_name {name!r} is no scheduler of diffusers")
    return scheduler.from_pretrained(folder, subfolder="scheduler")


def write_pipeline(base: Path, folder: Path, net_name: str, dtype: torch.dtype, weights: Iterator[tuple[str, Tensor]]) -> None:
    """A pipeline folder like `base`, all in one dtype, with the denoiser's weights streamed into safetensors shards.

    Only the components that model_index.json names are copied, and of each only the weights that were loaded: what else lies in the
    base folder (other variants, pickles, the whole original model in one file) stays behind. At most one shard is in memory.
    `folder` must not exist; the caller renames it into place when it is complete.
    """
    folder.mkdir(parents=True)
    shutil.copy(base / "model_index.json", folder)
    for part in sorted(path for path in base.iterdir() if path.is_dir() and path.name in _read_json(base / "model_index.json")):
        if part.name != net_name:
            _copy_component(part, folder / part.name, dtype)
    part = folder / net_name
    part.mkdir()
    shutil.copy(base / net_name / "config.json", part)
    stem = "diffusion_pytorch_model"
    files: list[dict[str, int]] = []
    pending: dict[str, Tensor] = {}
    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if pending and sum(t.numel() * t.element_size() for t in pending.values()) + size > MAX_SHARD_BYTES:
            files.append(_write_shard(part / f"{stem}-{len(files) + 1:05d}.safetensors", pending))
            pending = {}
        pending[name] = tensor
    files.append(_write_shard(part / f"{stem}-{len(files) + 1:05d}.safetensors", pending))
    if len(files) == 1:
        (part / f"{stem}-00001.safetensors").rename(part / f"{stem}.safetensors")
        return
    weight_map = {}
    for i, sizes in enumerate(files, 1):
        final = f"{stem}-{i:05d}-of-{len(files):05d}.safetensors"
        (part / f"{stem}-{i:05d}.safetensors").rename(part / final)
        weight_map |= {name: final for name in sizes}
    index = {"metadata": {"total_size": sum(sum(sizes.values()) for sizes in files)}, "weight_map": weight_map}
    (part / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _copy_component(part: Path, into: Path, dtype: torch.dtype) -> None:
    """Copy a component with its weights in `dtype` under plain names, and say so in its config: plain loaders trust what is stored."""
    from safetensors.torch import load_file, save_file

    into.mkdir()
    variant = _variant(part)
    for file in sorted(part.iterdir()):
        if file.suffix in COPIED and ".index." not in file.name:
            shutil.copy(file, into)
    for file in weight_files(part):
        plain = into / (file.name.replace(f".{variant}", "") if variant else file.name)
        tensors = load_file(file)
        converted = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        save_file(converted, plain, metadata={"format": "pt"})
        plain.chmod(0o644)
    for index in part.glob(f"*.safetensors.index{'.' + variant if variant else ''}.json"):
        text = index.read_text()
        plain_name = index.name.replace(f".{variant}", "") if variant else index.name
        (into / plain_name).write_text(text.replace(f".{variant}", "") if variant else text)
    config = into / "config.json"
    if config.is_file():
        content = _read_json(config)
        named = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in content}
        if named:
            config.write_text(json.dumps(content | named, indent=2, sort_keys=True) + "\n")


def stored_weights(folder: Path, net_name: str, only: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """The denoiser's tensors (or the one named) as the folder stores them, one at a time, in their stored dtype."""
    from safetensors import safe_open

    for file in weight_files(folder / net_name):
        with safe_open(file, "pt") as content:
            for name in content.keys():
                if only is None or name == only:
                    yield name, content.get_tensor(name)


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> dict[str, int]:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
