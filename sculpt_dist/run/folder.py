"""The run folder: whose it is, what it may hold, and what its checkpoints must belong to."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sculpt_dist.config.load import plain_values, to_yaml
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.core.files import text_sha256, write_atomically
from sculpt_dist.data.prompt_files import read_prompts
from sculpt_dist.engine.group import Group

OURS = (
    "config.yaml metrics.jsonl manifest.json costs.json checkpoints data evaluation model model.safetensors delta.safetensors lora "
    "kohya.safetensors report wandb tensorboard log.txt STOP REQUEUE"
).split()
KEPT_BY_FRESH = (
    "data",
    "STOP",
)  # the recipes of the data say what can be used again; a stop may be asked for while a run starts
UNDECIDING = (  # keys that do not change the result
    "run track engine.timeout engine.grace train.checkpoint_every train.background_save train.workers"
).split()
LATER: dict[str, Any] = {  # with these values they are left out: earlier runs, which had them not, did the same
    "prepare.prompts.files": {},
    "evaluate.prompts": {},
    "evaluate.retain_prompts": None,
    "train.schedule": "one_cycle",
    "engine.moments": "all",
    "engine.kernel": "auto",
    "engine.gathered": 1e9,
    "engine.checkpointing": False,
    "engine.compile": False,
}


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
        [
            path.name
            for path in folder.iterdir()
            if path.name not in OURS and path.name[0] != "." and path.suffix != ".safetensors"
        ]
        if folder.is_dir()
        else []
    )
    if strangers:
        return f"run.folder={folder} holds what is no part of a run ({', '.join(sorted(strangers)[:3])}): choose another folder"
    file = folder / "config.yaml"
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
        changes = _differences(theirs, plain_values(config)) + _changed_lists(folder, config)
        if changes and not config.run.override:
            return (
                f"run.folder={folder} belongs to a run with another configuration ({'; '.join(changes[:6])}): choose another run.folder, "
                "go on all the same with --override, or discard that run with --fresh"
            )
        if changes:
            print(f"going on with another configuration: {'; '.join(changes)}", flush=True)
            return None  # it is written when the checkpoint was found to fit it
    write_atomically(file, to_yaml(config).encode())
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


def _read_config(file: Path) -> dict[Any, Any] | None:
    """A run's config.yaml, or None where there is none that has our sections."""
    try:
        content = OmegaConf.load(file)
    except (OSError, OmegaConfBaseException, YAMLError, UnicodeDecodeError):
        return None
    ours = isinstance(content, DictConfig) and {section.name for section in fields(RunConfig)} <= set(content)
    return OmegaConf.to_container(content) if ours else None


def _deciding(content: dict[Any, Any]) -> dict[str, Any]:
    """All keys that decide the result, flat and dotted."""
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if key in UNDECIDING or (key in LATER and value == LATER[key]):
            return
        if isinstance(value, dict) and value:
            for name, member in value.items():
                walk(member, f"{key}.{name}" if key else str(name))
        else:
            flat[key] = value

    walk(content, "")
    return flat


def _differences(theirs: dict[Any, Any], mine: dict[Any, Any]) -> list[str]:
    before, now = _deciding(theirs), _deciding(mine)
    return [
        f"{key}: {before.get(key)} there, {now.get(key)} here"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]


def _list_checksums(config: RunConfig) -> dict[str, str]:
    """File -> checksum over what is read of it, of every file of prompts. Raises ConfigError for one that cannot be read."""
    retained = config.evaluate.retain_prompts
    files = [
        *config.prepare.prompts.files.values(),
        *(config.evaluate.prompts or {}).values(),
        *([retained] if retained else []),
    ]
    return {file: text_sha256(repr(read_prompts(file))) for file in files}


def _changed_lists(folder: Path, config: RunConfig) -> list[str]:
    """The files of prompts that hold something else than when the run of this folder began."""
    manifest = folder / "manifest.json"
    then = json.loads(manifest.read_bytes()).get("prompts", {}) if manifest.is_file() else {}
    return [
        f"{file}: its prompts were others"
        for file, now in _list_checksums(config).items()
        if then.get(file, now) != now
    ]


def _existing_parent(folder: Path) -> Path:
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def code_versions() -> dict[str, str]:
    """Of this package and of those that its numbers hang on."""
    return {name: version(name) for name in ("sculpt-dist", "torch", "deepspeed", "diffusers", "transformers")}


def write_manifest(folder: Path, config: RunConfig, base: str, shards: dict[str, str]) -> None:
    """manifest.json, and config.yaml once more: what this run is made from, and that it has not ended yet."""
    write_atomically(folder / "config.yaml", to_yaml(config).encode())
    content = {
        "base": base,
        "config": config_fingerprint(config),
        "shards": shards,
        "prompts": _list_checksums(config),
        "code": code_versions(),
    }
    write_atomically(folder / "manifest.json", json.dumps(content | {"finished": False}, indent=1).encode())


def mark_finished(folder: Path) -> None:
    """Note in manifest.json that all is done: what others may count on (see compare.py)."""
    content = json.loads((folder / "manifest.json").read_bytes())
    write_atomically(folder / "manifest.json", json.dumps(content | {"finished": True}, indent=1).encode())


def config_fingerprint(config: RunConfig) -> str:
    """A checksum over all that decides the result: not the run folder's name and the like, but what the files of prompts hold."""
    return text_sha256(json.dumps(_deciding(plain_values(config)) | _list_checksums(config), sort_keys=True))


def check_checkpoint(path: Path, state: dict[str, Any], fingerprints: dict[str, str], config: RunConfig) -> bool:
    """Whether a checkpoint was made with another configuration or other data, which only `run.override` accepts.

    Raises RunFolderError when it was and is not accepted, when it is of another base model, or when the concepts that it has finished
    are not the first ones of the configuration.
    """
    changed = [name for name, mine in fingerprints.items() if state[name] != mine]
    refused = [name for name in changed if name == "base" or not config.run.override]
    if refused:
        name = refused[0]
        cure = (
            "start over with --fresh"
            if name == "base"
            else "go on all the same with --override, or start over with --fresh"
        )
        raise RunFolderError(
            f"{path}: is of another {name} ({state[name][:12]}, now {fingerprints[name][:12]}); {cure}"
        )
    targets = [concept.target for concept in config.concepts]
    if targets[: len(state["finished"])] != state["finished"]:
        raise RunFolderError(
            f"{path}: has finished {', '.join(state['finished'])}, and the configuration begins with {', '.join(targets)}: keep what is "
            "finished in its place, or start over with --fresh"
        )
    return bool(changed)
