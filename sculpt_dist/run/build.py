"""Finishes the configuration: the method's own section, the ranks, the backbone and the engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from sculpt_dist.config.load import check_batch, merge_section
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.core.files import file_sha256, text_sha256
from sculpt_dist.core.plugins import plugin
from sculpt_dist.engine.group import Group
from sculpt_dist.run.folder import config_fingerprint

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def join_ranks(config: RunConfig) -> Group:
    """The ranks of this job, which all came with the same run folder and configuration. Raises LaunchError where they did not."""
    return Group(
        config.engine.timeout, f"run.folder={config.run.folder}, configuration {config_fingerprint(config)[:12]}"
    )


def build_method(config: RunConfig) -> Any:
    """The method that `method.name` names, with its own options checked like every other key."""
    name = config.method.get("name", "dm_cal")
    module = plugin("sculpt_dist.methods", name, "method.name")
    options = merge_section(module.Config, config.method, "method")
    return module.Method(options) if hasattr(module, "Method") else module.Editor(options)


def build_backbone(config: RunConfig, group: Group, path: str | None = None) -> Any:
    """The pipeline that `model.path` names (or the folder `path`), opened on every rank; its components are loaded on first use."""
    model = config.model
    kind = plugin("sculpt_dist.backbones", model.arch, "model.arch").Backbone
    from sculpt_dist.backbones.parts.options import Options

    options = Options(model.image_size, model.original_size, model.crop, model.target_size, model.cut_prompts)
    return kind(_model_folder(config, kind, path or model.path, group), DTYPES[model.dtype], group.device, options)


def _model_folder(config: RunConfig, kind: Any, path: str | None, group: Group) -> Path:
    """Where the pipeline lies: a folder as it is; a single file is unpacked into the run folder, once."""
    from sculpt_dist.backbones.formats.original import check_single_kind, read_single_file
    from sculpt_dist.backbones.io.find import find_folder, find_settings

    model = config.model
    if path is None or not Path(path).expanduser().is_file():
        return find_folder(path, model.arch, model.revision)
    file = Path(path).expanduser()
    about = file.stat()
    unpacked = (
        Path(config.run.folder)
        / f".base-{text_sha256(f'{file.absolute()} {about.st_size} {about.st_mtime_ns} {model.config}')[:12]}"
    )

    def unpack() -> None:
        if not unpacked.is_dir():
            check_single_kind(file)  # what is wrong with the file itself comes before what it lacks
            unpacked.parent.mkdir(parents=True, exist_ok=True)
            for debris in unpacked.parent.glob(f".{unpacked.name}.*.tmp"):
                shutil.rmtree(debris)
            read_single_file(file, find_settings(model.config, kind.public_settings, model.revision), unpacked)

    group.on_first(unpack)
    return unpacked


def build_engine(config: RunConfig, method: Any, backbone: Any, group: Group) -> Any:
    """The backbone's net under ZeRO, with the method's part of it open to training."""
    from sculpt_dist.engine.masking import MaskSettings
    from sculpt_dist.engine.zero import Engine, EngineSettings, sharded_net

    train, mask = config.train, config.mask
    settings = EngineSettings(
        stage=config.engine.stage,
        precision=config.engine.precision,
        micro_batch=check_batch(config, group.size),
        accumulate=train.accumulate,
        betas=train.betas,
        weight_decay=train.weight_decay,
        clip=train.clip,
        packed=config.engine.moments == "open",
        kernel=config.engine.kernel,
        gathered=config.engine.gathered,
    )
    masking = MaskSettings(
        mask.keep,
        mask.scope,
        mask.saliency,
        train.seed,
        resets_moments=not method.reference_mask,
    )
    if settings.stage < 3 and DTYPES[config.model.dtype] != PRECISIONS[config.engine.precision]:
        backbone.load_net(PRECISIONS[config.engine.precision])
    if settings.stage == 3:
        backbone.release(backbone.net_name)
        backbone.net = sharded_net(
            backbone.empty_net,
            backbone.stored_weights(),
            group,
            settings,
            {entry.name: entry.shape for entry in backbone.stored_entries()},
        )
    names = trained_names(config, method, backbone)
    if config.engine.checkpointing:
        backbone.net.enable_gradient_checkpointing()
    if config.engine.compile:
        backbone.net.forward = torch.compile(backbone.net.forward)  # below the hooks, which count passes
    return Engine(backbone.net, names, group, settings, masking, backbone.stored_weights)


def trained_names(config: RunConfig, method: Any, backbone: Any) -> list[str]:
    """The parameters that the method trains; puts its adapter into the net, if it has one.

    Raises ConfigError for a group that the net has not, and when nothing would train.
    """
    groups, net = backbone.groups(), type(backbone.net).__name__
    told = f"method.name={config.method.get('name', 'dm_cal')}"
    try:
        adapter = method.adapter(groups)
        names = list(method.trainable(groups)) if adapter is None else backbone.add_adapter(adapter, config.train.seed)
    except KeyError as error:
        raise ConfigError(
            f"{told} trains the group {error}, which {net} has not; there are: {', '.join(groups)}"
        ) from error
    if not names:
        raise ConfigError(f"{told} trains nothing of {net}: name groups that it has: {', '.join(groups)}")
    return names


def base_fingerprint(folder: Path) -> str:
    """A checksum over the weights and settings of every component: what checkpoints, shards and embeddings belong to.

    Raises ModelError when a file is not what its folder or the hub's cache says that it is.
    """
    from sculpt_dist.backbones.io.folders import expected_checksums, weight_files

    parts = sorted(part for part in folder.iterdir() if part.is_dir())
    files = [folder / "model_index.json"]
    for part in parts:
        files += [
            *weight_files(part),
            *sorted(file for file in part.iterdir() if file.suffix in (".json", ".txt", ".model")),
        ]
    found = {file: file_sha256(file) for file in files}
    for file, expected in expected_checksums(folder, files).items():
        if found[file] != expected:
            raise ModelError(
                f"{file}: is damaged or was changed: its sha256 is {found[file][:12]}..., expected {expected[:12]}...: fetch it again"
            )
    return text_sha256("\n".join(f"{file.relative_to(folder)} {checksum}" for file, checksum in found.items()))
