"""Pipeline folders, written: the denoiser's weights stream into safetensors shards, the rest is copied in one dtype."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
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
    weight_indices,
)
from sculpt_dist.backbones.io.tensorfile import entries, unwrapped
from sculpt_dist.core.errors import ModelError
from sculpt_dist.core.files import file_sha256
from sculpt_dist.core.tensorfile import Entry, TensorWriter, write_tensors

Checksums = dict[Path, str]  # of files, their sha256
STEM = "diffusion_pytorch_model"
MAX_SHARD_BYTES = 5_000_000_000
COPIED = (  # files of a component beside its weights, as diffusers and transformers write them
    "config.json generation_config.json scheduler_config.json preprocessor_config.json processor_config.json "
    "image_processor_config.json feature_extractor_config.json tokenizer.json tokenizer_config.json "
    "special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt tokenizer.model spiece.model "
    "sentencepiece.bpe.model chat_template.jinja chat_template.json"
).split()


def write_pipeline(
    base: Path,
    folder: Path,
    net_name: str,
    dtype: torch.dtype | None,
    weights: Iterator[tuple[str, Tensor]],
    beside: Path | None = None,
) -> None:
    """Write a pipeline folder like `base` with the denoiser's `weights`, which may come in any order.

    Everything is in `dtype`; None: as in `base`. A folder `beside` the components is copied as it is.

    Copies only the components that model_index.json names, and of each only the weights that are loaded: no other
    variants, no pickles, no single file of the whole model. About one tensor is in memory at a time. `folder` must not
    exist; the caller moves it into place when it is complete.
    """
    folder.mkdir(parents=True)
    shutil.copy(base / "model_index.json", folder)
    index, checksums = read_json(base / "model_index.json"), Checksums()
    for part in sorted(path for path in base.iterdir() if path.is_dir() and is_named(index, path.name)):
        if part.name != net_name:
            checksums |= _copy_component(part, folder / part.name, dtype)
    part = folder / net_name
    part.mkdir()
    shutil.copy(base / net_name / "config.json", part)
    checksums |= _write_shards(part, _in_dtype(stored_entries(base / net_name), dtype), weights)
    if beside is not None:
        shutil.copytree(beside, folder / beside.name)
    write_checksums(folder, checksums)


def is_wrapped(folder: Path) -> bool:
    """Whether weights of a pipeline folder are named by DataParallel or torch.compile; only headers are read."""
    parts = [part for part in sorted(folder.iterdir()) if (part / "config.json").is_file()]
    return any(unwrapped(entry.name) != entry.name for part in parts for entry in stored_entries(part))


def copy_unwrapped(folder: Path, output: Path) -> None:
    """Copy a pipeline folder, without what DataParallel and torch.compile put into the names of its weights.

    `output` must not exist; it is absent or complete. About one tensor is in memory at a time.
    """
    aside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        shutil.copy(folder / "model_index.json", aside)
        index = read_json(folder / "model_index.json")
        for part in sorted(path for path in folder.iterdir() if path.is_dir() and is_named(index, path.name)):
            _copy_component(part, aside / part.name, None)
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_shards(part: Path, planned: list[Entry], weights: Iterator[tuple[str, Tensor]]) -> Checksums:
    """Write a denoiser's weights as one file, or as several with an index."""
    shards = _cut(planned)
    names = [STEM if len(shards) == 1 else f"{STEM}-{i:05d}-of-{len(shards):05d}" for i in range(1, len(shards) + 1)]
    writers = [TensorWriter(part / f"{name}.safetensors", shard) for name, shard in zip(names, shards)]
    place = {entry.name: (writer, entry.dtype) for writer, shard in zip(writers, shards) for entry in shard}
    for name, tensor in weights:
        writer, stored = place[name]
        writer.write(name, tensor.to(stored))
    checksums = {writer.file: writer.finish() for writer in writers}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(entry.size for entry in planned)},
            "weight_map": {name: writer.file.name for name, (writer, _) in place.items()},
        }
        (part / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return checksums


def _in_dtype(stored: Sequence[Entry], dtype: torch.dtype | None) -> list[Entry]:
    """The entries with every float in `dtype`; None: as they are."""
    return [Entry(e.name, dtype if dtype and e.dtype.is_floating_point else e.dtype, e.shape) for e in stored]


def _cut(planned: Sequence[Entry]) -> list[list[Entry]]:
    """Consecutive tensors, at most MAX_SHARD_BYTES per file."""
    files: list[list[Entry]] = [[]]
    for entry in planned:
        if files[-1] and sum(e.size for e in files[-1]) + entry.size > MAX_SHARD_BYTES:
            files.append([])
        files[-1].append(entry)
    return files


def write_checksums(folder: Path, known: Mapping[Path, str]) -> None:
    """Write CHECKSUMS, the sha256 of every file, as `sha256sum -c` reads it; a run compares them before it starts.

    `known`: those that were computed while files were written. Other files, the small ones, are read.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    lines = [f"{known.get(path) or file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / CHECKSUMS).write_text("".join(lines))


def set_dtype(config: Path, dtype: torch.dtype) -> None:
    """Update the dtype in a component's config, where it names one: plain loaders trust it."""
    content = read_json(config)
    named = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in content}
    if named:
        config.write_text(json.dumps(content | named, indent=2, sort_keys=True) + "\n")


def settings_files(part: Path) -> list[Path]:
    """A component's settings and vocabularies, which a copy of it takes along.

    Raises ModelError for a link that leads out of the model's folder, other than into the cache of a hub.
    """
    files = [file for file in sorted(part.iterdir()) if file.name in COPIED]
    for file in files:
        place = file.resolve()
        if not place.is_relative_to(part.parent.resolve()) and place.parent.name != "blobs":
            raise ModelError(f"{file}: is a link to {place}, outside the model's folder; put the file itself there")
    return files


def _copy_component(part: Path, into: Path, dtype: torch.dtype | None) -> Checksums:
    """Copy a component, its weights in `dtype` (None: as they are) and under names without a variant or wrapper."""
    into.mkdir()
    variant, checksums = variant_of(part), Checksums()
    for file in settings_files(part):
        shutil.copy(file, into)
    for file in weight_files(part):
        planned = [entry._replace(name=unwrapped(entry.name)) for entry in _in_dtype(entries(file), dtype)]
        kept = {entry.name: entry.dtype for entry in planned}
        named = ((unwrapped(name), tensor) for name, tensor in file_tensors(file))
        cast, copy = ((name, tensor.to(kept[name])) for name, tensor in named), into / _plain(file.name, variant)
        checksums[copy] = write_tensors(copy, planned, cast)
    for index in weight_indices(part):
        content = json.loads(_plain(index.read_text(), variant))
        content["weight_map"] = {unwrapped(name): file for name, file in content["weight_map"].items()}
        (into / _plain(index.name, variant)).write_text(json.dumps(content, indent=2) + "\n")
    if dtype and (into / "config.json").is_file():
        set_dtype(into / "config.json", dtype)
    return checksums


def _plain(text: str, variant: str | None) -> str:
    return text.replace(f".{variant}", "") if variant else text
