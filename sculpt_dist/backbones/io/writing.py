"""Pipeline folders, written: the denoiser's weights are streamed into safetensors shards, the rest is copied in one dtype."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sculpt_dist.backbones.io.folders import (
    CHECKSUMS,
    file_tensors,
    is_named,
    read_json,
    stored_entries,
    variant_of,
    weight_files,
)
from sculpt_dist.backbones.io.tensorfile import Entry, TensorWriter, entries, write_tensors
from sculpt_dist.core.files import file_sha256

STEM = "diffusion_pytorch_model"
MAX_SHARD_BYTES = 5_000_000_000
COPIED = (".json", ".txt", ".model", ".jinja")  # of a component, beside its weights


def write_pipeline(
    base: Path, folder: Path, net_name: str, dtype: torch.dtype, weights: Iterator[tuple[str, Tensor]]
) -> None:
    """A pipeline folder like `base`, all in one dtype, with the denoiser's weights streamed into safetensors shards in any order.

    Only the components that model_index.json names are copied, and of each only the weights that were loaded: what else lies in the
    base folder (other variants, pickles, the whole original model in one file) stays behind. About one tensor is in memory at a time.
    `folder` must not exist; the caller renames it into place when it is complete.
    """
    folder.mkdir(parents=True)
    shutil.copy(base / "model_index.json", folder)
    index = read_json(base / "model_index.json")
    for part in sorted(path for path in base.iterdir() if path.is_dir() and is_named(index, path.name)):
        if part.name != net_name:
            _copy_component(part, folder / part.name, dtype)
    part = folder / net_name
    part.mkdir()
    shutil.copy(base / net_name / "config.json", part)
    planned = [
        Entry(e.name, dtype if e.dtype.is_floating_point else e.dtype, e.shape) for e in stored_entries(base / net_name)
    ]
    files = _cut(planned)
    names = [STEM if len(files) == 1 else f"{STEM}-{i:05d}-of-{len(files):05d}" for i in range(1, len(files) + 1)]
    writers = [TensorWriter(part / f"{name}.safetensors", entries) for name, entries in zip(names, files)]
    place = {entry.name: (writer, entry.dtype) for writer, entries in zip(writers, files) for entry in entries}
    for name, tensor in weights:
        writer, stored = place[name]
        writer.write(name, tensor.to(stored))
    for writer in writers:
        writer.finish()
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(entry.size for entry in planned)},
            "weight_map": {name: writer.file.name for name, (writer, _) in place.items()},
        }
        (part / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    write_checksums(folder)


def _cut(planned: Sequence[Entry]) -> list[list[Entry]]:
    """Consecutive tensors, together at most MAX_SHARD_BYTES per file."""
    files: list[list[Entry]] = [[]]
    for entry in planned:
        if files[-1] and sum(e.size for e in files[-1]) + entry.size > MAX_SHARD_BYTES:
            files.append([])
        files[-1].append(entry)
    return files


def write_checksums(folder: Path) -> None:
    """CHECKSUMS: the sha256 of every file of a pipeline folder, which is compared when the folder is opened for a run (sha256sum -c)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    (folder / CHECKSUMS).write_text(
        "".join(f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    )


def _copy_component(part: Path, into: Path, dtype: torch.dtype) -> None:
    """Copy a component with its weights in `dtype` under plain names, and say so in its config: plain loaders trust what is stored."""
    into.mkdir()
    variant = variant_of(part)
    for file in sorted(part.iterdir()):
        if file.suffix in COPIED and ".index." not in file.name:
            shutil.copy(file, into)
    for file in weight_files(part):
        plain = into / (file.name.replace(f".{variant}", "") if variant else file.name)
        planned = [Entry(e.name, dtype if e.dtype.is_floating_point else e.dtype, e.shape) for e in entries(file)]
        kept = {entry.name: entry.dtype for entry in planned}
        write_tensors(plain, planned, ((name, tensor.to(kept[name])) for name, tensor in file_tensors(file)))
    for index in part.glob(f"*.safetensors.index{'.' + variant if variant else ''}.json"):
        text = index.read_text()
        plain_name = index.name.replace(f".{variant}", "") if variant else index.name
        (into / plain_name).write_text(text.replace(f".{variant}", "") if variant else text)
    config = into / "config.json"
    if config.is_file():
        content = read_json(config)
        named = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in content}
        if named:
            config.write_text(json.dumps(content | named, indent=2, sort_keys=True) + "\n")
