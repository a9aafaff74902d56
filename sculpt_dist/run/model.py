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

    Components load on first use. A single file is unpacked into the folder `run` once. Raises ConfigError for an
    unknown kind of model, ModelError for a folder or file that cannot be used.
    """
    import torch

    kind = plugin("sculpt_dist.backbones", model.arch, "model.arch").Backbone
    from sculpt_dist.backbones.parts.options import Options

    options = Options(model.image_size, model.original_size, model.crop, model.target_size, model.cut_prompts)
    place = folder if folder is not None else _pipeline_folder(model, kind, group, run)
    backbone: Backbone = kind(place, getattr(torch, model.dtype), group.device, options)
    return backbone


def _pipeline_folder(model: ModelConfig, kind: type[Backbone], group: Group, run: Path) -> Path:
    """The folder of `model.path`; a single file is unpacked into the run folder, once."""
    from sculpt_dist.backbones.formats.original import check_single_kind, read_single_file
    from sculpt_dist.backbones.io.find import find_folder, find_settings

    if model.path is None or not Path(model.path).expanduser().is_file():
        return find_folder(model.path, model.arch, model.revision)
    file = Path(model.path).expanduser()
    about = file.stat()
    key = text_sha256(f"{file.absolute()} {about.st_size} {about.st_mtime_ns} {model.config}")[:12]
    unpacked = run / f".base-{key}"

    def unpack() -> None:
        if not unpacked.is_dir():
            check_single_kind(file)  # report a damaged file before missing settings
            make_folder(unpacked.parent)
            for debris in unpacked.parent.glob(f".{unpacked.name}.*.tmp"):
                shutil.rmtree(debris, ignore_errors=True)
            read_single_file(file, find_settings(model.config, kind.public_settings, model.revision), unpacked)

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
