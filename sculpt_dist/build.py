"""Finishes the configuration: the method's own section, the backbone, the engine, and the run folder."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import pkgutil
import platform
import shutil
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sculpt_dist import __version__
from sculpt_dist.config import check_batch, merge_section, to_yaml
from sculpt_dist.engine.group import Group
from sculpt_dist.errors import ConfigError, ModelError, RunFolderError
from sculpt_dist.files import file_sha256, text_sha256, write_atomically
from sculpt_dist.settings import RunConfig

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def plugins(package: str) -> list[str]:
    """Names of the plugins in a package: its modules, but for `base`; what they share lies in packages of its own."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(module.name for module in found if module.name != "base" and not module.ispkg)


def plugin(package: str, name: str, key: str) -> ModuleType:
    """Import `<package>.<name>`. Raises ConfigError that lists what there is."""
    there = plugins(package)
    if name not in there:
        close = difflib.get_close_matches(str(name), there, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"{key}={name}: there is no such {package.rpartition('.')[2].removesuffix('s')}.{hint} There are: {', '.join(there)}."
        )
    return importlib.import_module(f"{package}.{name}")


def join_ranks(config: RunConfig) -> Group:
    """The ranks of this job, which all came with the same run folder and configuration. Raises LaunchError where they did not."""
    return Group(config.engine.timeout, f"run.folder={config.run.folder}, configuration {config_fingerprint(config)[:12]}")


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
    from sculpt_dist.backbones.shared.options import Options

    options = Options(model.image_size, model.original_size, model.crop, model.target_size, model.cut_prompts)
    return kind(_model_folder(config, kind, path or model.path, group), DTYPES[model.dtype], group.device, options)


def _model_folder(config: RunConfig, kind: Any, path: str | None, group: Group) -> Path:
    """Where the pipeline lies: a folder as it is; a single file is unpacked into the run folder, once."""
    from sculpt_dist.backbones.shared.find import find_folder, find_settings
    from sculpt_dist.backbones.shared.original import check_single_kind, read_single_file

    model = config.model
    if path is None or not Path(path).expanduser().is_file():
        return find_folder(path, model.arch, model.revision)
    file = Path(path).expanduser()
    about = file.stat()
    unpacked = (
        Path(config.run.folder) / f".base-{text_sha256(f'{file.absolute()} {about.st_size} {about.st_mtime_ns} {model.config}')[:12]}"
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
    from sculpt_dist.engine.mask import MaskSettings
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
    )
    masking = MaskSettings(
        mask.keep,
        mask.scope,
        mask.saliency,
        train.seed,
        resets_moments=not method.reference_mask,
        clears_saliency=not method.reference_mask,
    )
    if settings.stage < 3 and DTYPES[config.model.dtype] != PRECISIONS[config.engine.precision]:
        backbone.load_net(PRECISIONS[config.engine.precision])
    if settings.stage == 3:
        backbone.release(backbone.net_name)
        backbone.net = sharded_net(
            backbone.empty_net, backbone.stored_weights(), group, settings, {entry.name: entry.shape for entry in backbone.stored_entries()}
        )
    groups = backbone.groups()
    adapter = method.adapter(groups)
    names = list(method.trainable(groups)) if adapter is None else backbone.add_adapter(adapter, train.seed)
    return Engine(backbone.net, names, group, settings, masking, backbone.stored_weights)


OURS = (
    "config.yaml metrics.jsonl manifest.json costs.json checkpoints data evaluation model model.safetensors delta.safetensors lora "
    "kohya.safetensors report wandb tensorboard log.txt STOP REQUEUE"
).split()
KEPT_BY_FRESH = ("data",)  # its recipes say themselves what can be used again
UNDECIDING = ("run", "track", "engine.timeout", "engine.grace", "train.checkpoint_every", "train.background_save", "train.workers")  # keys that do not change the result


def claim_folder(config: RunConfig, group: Group) -> Path:
    """The run folder, ours alone: empty, or of this very configuration, and locked until this process ends.

    Raises RunFolderError that names what differs, or who holds it.
    """
    folder = Path(config.run.folder)
    error = group.from_first(_claim(folder, config) if group.is_first else None)
    if error:
        raise RunFolderError(error)
    return folder


def _claim(folder: Path, config: RunConfig) -> str | None:
    if not all(parent.is_dir() for parent in (folder, *folder.absolute().parents) if parent.exists()):
        return f"run.folder={folder} is, or lies below, a file: choose another folder"
    if not os.access(_existing_parent(folder), os.W_OK):
        return f"run.folder={folder} cannot be written: choose another folder"
    strangers = (
        [path.name for path in folder.iterdir() if path.name not in OURS and path.name[0] != "." and path.suffix != ".safetensors"]
        if folder.is_dir()
        else []
    )
    if strangers:
        return f"run.folder={folder} holds what is no part of a run ({', '.join(sorted(strangers)[:3])}): choose another folder"
    file, text = folder / "config.yaml", to_yaml(config)
    theirs = _read_config(file)
    if theirs is None and file.is_file():
        return f"{file} is no configuration of a run: choose another run.folder"
    folder.mkdir(parents=True, exist_ok=True)
    held = _lock(folder)
    if held:
        return held
    if config.run.fresh:
        for name in set(OURS) - set(KEPT_BY_FRESH):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif theirs is not None and any((folder / name).exists() for name in ("checkpoints", "evaluation")):
        changes = _differences(theirs, OmegaConf.create(text))
        if changes and not config.run.override:
            return (
                f"run.folder={folder} belongs to a run with another configuration ({'; '.join(changes[:6])}): choose another run.folder, "
                "go on all the same with --override, or discard that run with --fresh"
            )
        if changes:
            print(f"going on with another configuration: {'; '.join(changes)}", flush=True)
    write_atomically(file, text.encode())
    return None


def _lock(folder: Path) -> str | None:
    """Hold the folder until this process ends; says who holds it when somebody else does."""
    from filelock import FileLock, Timeout

    note = folder / ".holder"
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = note.read_text() if note.is_file() else "another process"
        return f"run.folder={folder} is in use by {holder}: wait for it, or choose another folder"
    _locks[str(folder.absolute())] = lock
    note.write_text(
        f"process {os.getpid()} on {platform.node()}"
        + (f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else "")
    )
    return None


_locks: dict[str, Any] = {}  # kept open: a lock ends when its object does


def release_folder(folder: Path) -> None:
    """Let others have the folder; a process that ends does so by itself."""
    lock = _locks.pop(str(folder.absolute()), None)
    if lock is not None:
        lock.release()


def _read_config(file: Path) -> DictConfig | None:
    """A run's config.yaml, or None where there is none that has our sections."""
    try:
        content = OmegaConf.load(file)
    except (OSError, OmegaConfBaseException, YAMLError, UnicodeDecodeError):
        return None
    ours = isinstance(content, DictConfig) and {section.name for section in fields(RunConfig)} <= set(content)
    return content if ours else None


def _deciding(content: DictConfig) -> dict[str, Any]:
    """All keys that decide the result, flat and dotted."""
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if key in UNDECIDING:
            return
        if isinstance(value, dict) and value:
            for name, member in value.items():
                walk(member, f"{key}.{name}" if key else str(name))
        else:
            flat[key] = value

    walk(OmegaConf.to_container(content), "")
    return flat


def _differences(theirs: DictConfig, mine: DictConfig) -> list[str]:
    before, now = _deciding(theirs), _deciding(mine)
    return [f"{key}: {before.get(key)} there, {now.get(key)} here" for key in sorted({*before, *now}) if before.get(key) != now.get(key)]


def _existing_parent(folder: Path) -> Path:
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def base_fingerprint(folder: Path) -> str:
    """A checksum over the weights and settings of every component: what checkpoints, shards and embeddings belong to.

    Raises ModelError when a file is not what its folder or the hub's cache says that it is.
    """
    from sculpt_dist.backbones.shared.folders import expected_checksums, weight_files

    parts = sorted(part for part in folder.iterdir() if part.is_dir())
    files = [folder / "model_index.json"]
    for part in parts:
        files += [*weight_files(part), *sorted(file for file in part.iterdir() if file.suffix in (".json", ".txt", ".model"))]
    found = {file: file_sha256(file) for file in files}
    for file, expected in expected_checksums(folder, files).items():
        if found[file] != expected:
            raise ModelError(
                f"{file}: is damaged or was changed: its sha256 is {found[file][:12]}..., expected {expected[:12]}...: fetch it again"
            )
    return text_sha256("\n".join(f"{file.relative_to(folder)} {checksum}" for file, checksum in found.items()))


def code_versions() -> dict[str, str]:
    """Of this package and of those that its numbers hang on."""
    return {"sculpt-dist": __version__} | {name: version(name) for name in ("torch", "deepspeed", "diffusers", "transformers")}


def write_manifest(folder: Path, config: RunConfig, base: str, shards: dict[str, str]) -> None:
    """manifest.json: what this run was made from."""
    content = {"base": base, "config": config_fingerprint(config), "shards": shards, "code": code_versions()}
    write_atomically(folder / "manifest.json", json.dumps(content, indent=1).encode())


def config_fingerprint(config: RunConfig) -> str:
    """A checksum over all that decides the result, so without the run folder's name and the like."""
    return text_sha256(json.dumps(_deciding(OmegaConf.create(to_yaml(config))), sort_keys=True, default=str))


def check_checkpoint(path: Path, state: dict[str, Any], fingerprints: dict[str, str], config: RunConfig) -> bool:
    """Whether a checkpoint was made with another configuration or other data, which only `run.override` accepts.

    Raises RunFolderError when it was and is not accepted, when it is of another base model, or when the concepts that it has finished
    are not the first ones of the configuration.
    """
    changed = [name for name, mine in fingerprints.items() if state[name] != mine]
    refused = [name for name in changed if name == "base" or not config.run.override]
    if refused:
        name = refused[0]
        cure = "start over with --fresh" if name == "base" else "go on all the same with --override, or start over with --fresh"
        raise RunFolderError(f"{path}: is of another {name} ({state[name][:12]}, now {fingerprints[name][:12]}); {cure}")
    targets = [concept.target for concept in config.concepts]
    if targets[: len(state["finished"])] != state["finished"]:
        raise RunFolderError(
            f"{path}: has finished {', '.join(state['finished'])}, and the configuration begins with {', '.join(targets)}: keep what is "
            "finished in its place, or start over with --fresh"
        )
    return bool(changed)
