"""Finishes the configuration: the method's own section, the backbone, the engine, and the run folder."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import pkgutil
import shutil
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sculpt_dist import __version__
from sculpt_dist.config import RunConfig, check_batch, merge_section, to_yaml
from sculpt_dist.engine.group import Group
from sculpt_dist.errors import ConfigError, RunFolderError
from sculpt_dist.files import file_sha256, text_sha256, write_atomically

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NO_PLUGINS = ("base", "folders", "tiny")  # modules of a plugin package that are no plugins


def plugins(package: str) -> list[str]:
    """Names of the plugins in a package: its modules, without the ones that all share."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(module.name for module in found if module.name not in NO_PLUGINS)


def plugin(package: str, name: str, key: str) -> ModuleType:
    """Import `<package>.<name>`. Raises ConfigError that lists what there is."""
    there = plugins(package)
    if name not in there:
        close = difflib.get_close_matches(str(name), there, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{key}={name}: there is no such {package.rpartition('.')[2].removesuffix('s')}.{hint} There are: {', '.join(there)}.")
    return importlib.import_module(f"{package}.{name}")


def build_method(config: RunConfig) -> Any:
    """The method that `method.name` names, with its own options checked like every other key."""
    name = config.method.get("name", "dm_cal")
    module = plugin("sculpt_dist.methods", name, "method.name")
    options = merge_section(module.Config, config.method, "method")
    return module.Method(options) if hasattr(module, "Method") else module.Editor(options)


def build_backbone(config: RunConfig, group: Group, path: str | None = None) -> Any:
    """The pipeline that `model.path` names (or the folder `path`), loaded on every rank."""
    module = plugin("sculpt_dist.backbones", config.model.arch, "model.arch")
    from sculpt_dist.backbones.folders import find_folder

    folder = find_folder(path or config.model.path, config.model.arch, config.model.revision)
    return module.Backbone.load(folder, DTYPES[config.model.dtype], group.device)


def build_engine(config: RunConfig, method: Any, backbone: Any, group: Group) -> Any:
    """The backbone's net under ZeRO, with the method's part of it open to training."""
    from sculpt_dist.engine.mask import MaskSettings
    from sculpt_dist.engine.zero import Engine, EngineSettings

    train, mask = config.train, config.mask
    settings = EngineSettings(
        stage=config.engine.stage,
        precision=config.engine.precision,
        micro_batch=check_batch(config, group.size),
        accumulate=train.accumulate,
        betas=train.betas,
        weight_decay=train.weight_decay,
        clip=train.clip,
    )
    masking = MaskSettings(
        mask.keep,
        mask.scope,
        mask.saliency,
        train.seed,
        resets_moments=not method.reference_mask,
        clears_saliency=not method.reference_mask,
    )
    if method.adapter is not None:
        names = backbone.add_adapter(method.adapter, train.seed)
    else:
        names = list(method.trainable(backbone.groups()))
    return Engine(backbone.net, names, group, settings, masking)


def claim_folder(config: RunConfig, group: Group) -> Path:
    """The run folder, ours: empty, or of this very configuration. Raises RunFolderError naming what differs."""
    folder = Path(config.run.folder)
    error = group.from_first(_claim(folder, config) if group.is_first else None)
    if error:
        raise RunFolderError(error)
    return folder


def _claim(folder: Path, config: RunConfig) -> str | None:
    text = to_yaml(config)
    mine = _comparable(text)
    file = folder / "config.yaml"
    if file.is_file() and not config.run.fresh:
        theirs = _comparable(file.read_text())
        if mine != theirs:
            changes = [line for line in difflib.unified_diff(theirs, mine, lineterm="", n=0) if line[:1] in "+-" and line[:3] not in ("---", "+++")]
            return (
                f"run.folder={folder} belongs to a run with another configuration ({'; '.join(' '.join(c.split()) for c in changes[:6])}): "
                "choose another run.folder, or discard that run with run.fresh=true"
            )
        return None
    if folder.exists() and not folder.is_dir():
        return f"run.folder={folder} is a file: choose another folder"
    if folder.is_dir() and any(folder.iterdir()):
        if not file.is_file():
            return f"run.folder={folder} holds files but no run of ours (no config.yaml): choose another folder"
        shutil.rmtree(folder)
    if not os.access(_existing_parent(folder), os.W_OK):
        return f"run.folder={folder} cannot be written: choose another folder"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text.encode())
    return None


def _comparable(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.strip().startswith(("fresh:", "folder:"))]


def _existing_parent(folder: Path) -> Path:
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def base_fingerprint(folder: Path, net_name: str) -> str:
    """A checksum over the weights of the denoiser and the model index: what a checkpoint and shards belong to."""
    files = [folder / "model_index.json", *sorted((folder / net_name).glob("*.safetensors"))]
    return text_sha256("\n".join(f"{file.name} {file_sha256(file)}" for file in files))


def write_manifest(folder: Path, config: RunConfig, base: str, shards: dict[str, str]) -> None:
    """manifest.json: what this run was made from."""
    packages = {"sculpt-dist": __version__} | {name: version(name) for name in ("torch", "deepspeed", "diffusers", "transformers")}
    content = {"base": base, "config": config_fingerprint(config), "shards": shards, "code": packages}
    write_atomically(folder / "manifest.json", json.dumps(content, indent=1).encode())


def config_fingerprint(config: RunConfig) -> str:
    """A checksum over all that decides the result, so without the run folder's name."""
    return text_sha256("\n".join(_comparable(to_yaml(config))))


def check_checkpoint(path: Path, state: dict[str, Any], base: str, config: RunConfig) -> None:
    """Raises RunFolderError when a checkpoint is of another base model or configuration."""
    for name, mine in (("base", base), ("config", config_fingerprint(config))):
        if state[name] != mine:
            what = "base model" if name == "base" else "configuration"
            raise RunFolderError(f"{path}: is of another {what} ({state[name][:12]}, now {mine[:12]}); start over with run.fresh=true")
