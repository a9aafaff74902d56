"""The base model of a run: finding its pipeline, opening it, and the checksum that identifies it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sculpt_dist.config.schema import ModelConfig
from sculpt_dist.core.errors import ModelError
from sculpt_dist.core.files import file_sha256, make_folder, text_sha256
from sculpt_dist.core.plugins import plugin

if TYPE_CHECKING:
    from sculpt_dist.backbones.base import Backbone
    from sculpt_dist.engine.group import Group


def open_backbone(model: ModelConfig, group: Group, run: Path, folder: Path | None = None) -> Backbone:
    """The pipeline that `model.path` names, or the one in `folder`, opened on every rank.

    Components load on first use. A single file is unpacked into the folder `run` once. A guard in `folder` acts. Raises
    ConfigError for an unknown kind of model, ModelError for a folder or file that cannot be used, and for a
    `model.path` with a guard, which a run would neither see nor keep.
    """
    import torch

    from sculpt_dist.guards import GUARD, guard_backbone

    kind = plugin("sculpt_dist.backbones", model.arch, "model.arch").Backbone
    from sculpt_dist.backbones.parts.options import Options

    options = Options(
        model.image_size,
        model.original_size,
        model.crop,
        model.target_size,
        model.cut_prompts,
        text_batch=model.text_batch,
        text_dtype=getattr(torch, model.text_dtype) if model.text_dtype else None,
        vae_dtype=getattr(torch, model.vae_dtype) if model.vae_dtype else None,
    )
    place = folder if folder is not None else _pipeline_folder(model, kind, group, run)
    backbone: Backbone = kind(place, getattr(torch, model.dtype), group.device, options)
    if folder is not None and (place / GUARD).is_dir():
        guard_backbone(backbone, place / GUARD)
    return backbone


def _pipeline_folder(model: ModelConfig, kind: type[Backbone], group: Group, run: Path) -> Path:
    """The folder of `model.path`. A single file, or weights with a wrapper's names, are copied into the run once."""
    from sculpt_dist.backbones.formats.original import check_single_kind, read_single_file
    from sculpt_dist.backbones.io.find import find_folder, find_settings
    from sculpt_dist.backbones.io.folders import weight_files
    from sculpt_dist.backbones.io.writing import copy_unwrapped, is_wrapped
    from sculpt_dist.guards import GUARD

    file = Path(model.path).expanduser() if model.path is not None else Path()
    is_file = model.path is not None and file.is_file()
    place = file if is_file else find_folder(model.path, model.arch, model.revision, model.world)
    if not is_file and (place / GUARD).is_dir():
        raise ModelError(f"{place}: has a guard: start from the model that it was fitted to, or remove {place / GUARD}")
    if not is_file and not is_wrapped(place):
        return place
    sources = (
        [place]
        if is_file
        else [source for part in sorted(place.iterdir()) if part.is_dir() for source in weight_files(part)]
    )
    about = " ".join(f"{source.absolute()} {source.stat().st_size} {source.stat().st_mtime_ns}" for source in sources)
    key = text_sha256(f"{about} {model.config}")[:12]
    unpacked = run / f".base-{key}"

    def unpack() -> None:
        if unpacked.is_dir():
            return
        if is_file:
            check_single_kind(place)  # report a damaged file before missing settings
        make_folder(unpacked.parent)
        for debris in unpacked.parent.glob(f".{unpacked.name}.*.tmp"):
            shutil.rmtree(debris, ignore_errors=True)
        if is_file:
            read_single_file(place, find_settings(model.config, kind.public_settings, model.revision), unpacked)
        else:
            copy_unwrapped(place, unpacked)

    group.on_first(unpack)
    return unpacked


def base_fingerprint(folder: Path) -> str:
    """A checksum over the weights and settings of every component, recorded by checkpoints, shards and embeddings.

    Raises ModelError when a file differs from the checksum that its folder or the hub's cache records.
    """
    from sculpt_dist.backbones.io.folders import expected_checksums, weight_files

    files = [folder / "model_index.json"]
    for part in sorted(part for part in folder.iterdir() if part.is_dir()):
        settings = sorted(file for file in part.iterdir() if file.suffix in (".json", ".txt", ".model"))
        files += [*weight_files(part), *settings]
    found = {file: file_sha256(file) for file in files}
    for file, expected in expected_checksums(folder, files).items():
        if found[file] != expected:
            raise ModelError(
                f"{file}: is damaged or was changed: its sha256 is {found[file][:12]}..., expected {expected[:12]}...: "
                "fetch it again"
            )
    return text_sha256("\n".join(f"{file.relative_to(folder)} {checksum}" for file, checksum in found.items()))
