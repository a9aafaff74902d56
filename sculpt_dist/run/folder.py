"""The run folder: its lock, its contents, and whether its configuration and checkpoints match the run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from yaml import YAMLError

from sculpt_dist.config.load import plain_values, read_run_config, to_yaml
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError, RunFolderError
from sculpt_dist.core.files import (
    is_text_intact,
    read_object,
    remove_leftovers,
    sealed_text,
    text_sha256,
    write_atomically,
    write_record,
)
from sculpt_dist.core.locks import Lock
from sculpt_dist.core.messages import shortlist
from sculpt_dist.run.fingerprint import config_fingerprint, deciding_keys, list_checksums
from sculpt_dist.run.owned import foreign_data, make_room, put_aside

if TYPE_CHECKING:
    from sculpt_dist.engine.group import Group

CONTENTS = (
    "config.yaml metrics.jsonl manifest.json costs.json usage.jsonl log.txt STOP REQUEUE checkpoints data evaluation "
    "attacks attacks-model report audit wandb tensorboard guard model model.safetensors delta.safetensors lora "
    "kohya.safetensors"
).split()
MANIFEST_REMEDY = "remove it and repeat the command, which writes it anew"
BEFORE_A_RUN = ("data", "log.txt", "STOP", "REQUEUE")  # may lie in a folder in which no run has begun
LATER_SECTIONS = {"hold", "attack", "adversarial"}  # of a configuration, which runs of earlier versions lack
NAMED = 20  # finished concepts that a checkpoint names
JOB_LOGS = (".out", ".err", ".log")
KEPT_BY_FRESH = ("data", "STOP")  # recipes decide which data is reused; STOP may arrive while a run starts


def claim_folder(config: RunConfig, group: Group) -> Path:
    """Lock the run folder, which must be empty or belong to this configuration, until this process ends.

    Raises RunFolderError that names the difference, or the process that holds the lock.
    """
    folder = Path(config.run.folder)

    def claim() -> None:
        try:
            error = _claim(folder, config)
        except (OSError, RuntimeError) as raised:  # a full disk, a name that is too long, links in a circle
            error = f"run.folder={str(folder)[:200]} cannot be used ({str(raised)[:200]}): choose another folder"
        if error:
            raise RunFolderError(error)

    group.on_first(claim)
    return folder


def _claim(folder: Path, config: RunConfig) -> str | None:
    """Claim the folder on the first rank; returns the reason if that fails."""
    file = folder / "config.yaml"
    before = _read_config(file)
    refused = _unusable(folder, before is not None)
    if refused:
        return refused
    if before is None and os.path.lexists(file):
        return f"{file} is not the configuration of a run: choose another run.folder"
    folder.mkdir(parents=True, exist_ok=True)
    held = _lock(folder)
    if held:
        return held
    refused = "an error"
    try:
        refused = _claim_locked(folder, config, before)
    finally:
        if refused:
            release_folder(folder)
    return refused


def _claim_locked(folder: Path, config: RunConfig, before: dict[Any, Any] | None) -> str | None:
    inside = (place for name in ("data", "evaluation", "attacks", "report") for place in (folder / name).rglob("**"))
    for place in (folder, folder / "checkpoints", folder / "model", *inside):
        remove_leftovers(place)
    strangers = [path.name for path in folder.iterdir() if before is not None and _is_strange(path.name)]
    if strangers:
        print(f"run.folder={folder} also holds {', '.join(sorted(strangers)[:5])}: not of this run, left alone")
    if config.run.fresh:
        for name in set(CONTENTS) - set(KEPT_BY_FRESH):
            make_room(folder / name)
    elif before is not None and any((folder / name).exists() for name in ("checkpoints", "evaluation", "model")):
        changes = _differences(before, plain_values(config)) + _changed_lists(folder, config)
        if changes and not config.run.override:
            return (
                f"run.folder={folder} belongs to a run with another configuration ({'; '.join(changes[:6])}): choose "
                "another run.folder, continue all the same with --override, or discard that run with --fresh"
            )
        if changes:
            print(f"continuing with another configuration: {'; '.join(changes)}", flush=True)
            return None  # config.yaml is rewritten once the checkpoint is known to fit
    _write_config(folder, config)
    return None


def _write_config(folder: Path, config: RunConfig) -> None:
    """Write config.yaml; one that a user wrote or edited there is renamed, with its comments."""
    file = folder / "config.yaml"
    if file.is_file():
        text = file.read_text(encoding="utf-8", errors="replace")
        intact = is_text_intact(text)
        if intact is None:  # an earlier version, or a user, wrote it
            intact = OmegaConf.to_yaml(OmegaConf.create(read_run_config(file))) == text
        if not intact:
            print(f"{file}: was edited, so it is kept as {put_aside(file)}", flush=True)
    write_atomically(file, sealed_text(to_yaml(config)).encode())


def check_inputs(config: RunConfig) -> None:
    """Raises ConfigError for an input inside the run folder, where the run would write over it."""
    folder, model, prepare, evaluate = config.run.folder, config.model, config.prepare, config.evaluate
    inputs = {
        "model.path": model.path,
        "model.config": model.config,
        "prepare.images": prepare.images,
        "prepare.folder": prepare.folder,
        "hold.prompts": config.hold.prompts,
        "evaluate.reference": evaluate.reference,
        "evaluate.clip": evaluate.clip,
        "evaluate.retain_prompts": evaluate.retain_prompts,
    }
    inputs |= {f"prepare.prompts.files.{name}": file for name, file in prepare.prompts.files.items()}
    inputs |= {f"evaluate.prompts.{name}": file for name, file in (evaluate.prompts or {}).items()}
    run = os.path.realpath(folder)
    outputs = {run, *(os.path.realpath(Path(folder) / name) for name in ("model", "checkpoints", "data", "evaluation"))}
    for key, value in inputs.items():
        place = os.path.realpath(value) if value else ""
        inside = any(place.startswith(os.path.join(output, "")) and os.path.exists(place) for output in outputs)
        around = key == "model.path" and run.startswith(os.path.join(place, "")) and os.path.isdir(place)
        if value and (place in outputs or inside or around):
            raise ConfigError(
                f"{key}={value}: lies in run.folder={folder}, where this run writes, or around it; choose another"
            )


def _unusable(folder: Path, is_ours: bool) -> str | None:
    """The reason why a folder cannot be a run folder, or None. In one that is a run's already, other files may lie."""
    if not all(parent.is_dir() for parent in (folder, *folder.absolute().parents) if parent.exists()):
        return f"run.folder={folder} is a file, or is inside one: choose another folder"
    if not os.access(_existing_parent(folder), os.W_OK):
        return f"run.folder={folder} cannot be written: choose another folder"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if is_ours:
        for name in CONTENTS:
            (folder / name).resolve()  # raises RuntimeError for links in a circle
        return None
    foreign = [name for name in names if not (name in BEFORE_A_RUN or name[0] == "." or name.endswith(JOB_LOGS))]
    foreign += [str(path.relative_to(folder)) for path in foreign_data(folder / "data")]
    if foreign and "config.yaml" not in foreign:  # that has a message of its own
        return (
            f"run.folder={folder} contains files of something else ({', '.join(sorted(foreign)[:3])}): "
            "choose another folder"
        )
    return None


_locks: dict[str, Lock] = {}


def _is_strange(name: str) -> bool:
    return not (name in CONTENTS or name[0] == "." or ".kept-" in name or name.endswith((".safetensors", *JOB_LOGS)))


def _lock(folder: Path) -> str | None:
    """Lock the folder until this process ends; returns an error message if another process holds the lock."""
    lock = Lock(folder / ".lock")
    holder = lock.acquire()
    if holder is not None:
        return f"run.folder={folder} is in use by {holder} ({lock.file}): wait for it, or choose another folder"
    _locks[str(folder.absolute())] = lock
    return None


def release_folder(folder: Path) -> None:
    """Release the lock of the folder before the process ends, which would release it, too."""
    lock = _locks.pop(str(folder.absolute()), None)
    if lock is not None:
        lock.release()


def _read_config(file: Path) -> dict[Any, Any] | None:
    """A run's config.yaml, or None where there is none with our sections."""
    try:
        values = read_run_config(file)  # OmegaConf.load refuses the concepts of a long run
    except (OSError, YAMLError, UnicodeDecodeError):
        return None
    sections = {section.name for section in fields(RunConfig)} - LATER_SECTIONS
    is_ours = isinstance(values, dict) and sections <= set(values)
    return values if is_ours else None


def _differences(before: dict[Any, Any], now: dict[Any, Any]) -> list[str]:
    old, new = deciding_keys(before), deciding_keys(now)
    return [
        f"{key}: {old.get(key)} there, {new.get(key)} here"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def _changed_lists(folder: Path, config: RunConfig) -> list[str]:
    """The files of prompts that have changed since the run of this folder began."""
    manifest = folder / "manifest.json"
    then = read_object(manifest, MANIFEST_REMEDY).get("prompts", {}) if manifest.exists() else {}
    present = list_checksums(config)
    return [f"{file}: its prompts have changed" for file, now in present.items() if then.get(file, now) != now]


def _existing_parent(folder: Path) -> Path:
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def code_versions() -> dict[str, str]:
    """Versions of this package and of those that its numbers depend on."""
    return {name: version(name) for name in ("sculpt-dist", "torch", "deepspeed", "diffusers", "transformers")}


def write_manifest(folder: Path, config: RunConfig, base: str, shards: Mapping[str, str]) -> None:
    """Write manifest.json, which lists what the run is made from and marks it unfinished; rewrite config.yaml."""
    _write_config(folder, config)
    content = {
        "base": base,
        "config": config_fingerprint(config),
        "shards": dict(shards),
        "prompts": list_checksums(config),
        "code": code_versions(),
    }
    write_record(folder / "manifest.json", content | {"finished": False})


def mark_finished(folder: Path) -> None:
    """Record in manifest.json that the run has finished; comparisons and sweeps rely on it."""
    content = read_object(folder / "manifest.json", MANIFEST_REMEDY)
    write_record(folder / "manifest.json", content | {"finished": True})


def check_checkpoint(
    path: Path, state: Mapping[str, Any], fingerprints: Mapping[str, str], override: bool, targets: Sequence[str]
) -> bool:
    """Whether a checkpoint was made with another configuration or other data, which only `override` accepts.

    Raises RunFolderError when that is not accepted, when the checkpoint belongs to another base model, or when the
    concepts that it has finished are not the first of `targets`.
    """
    changed = [name for name, present in fingerprints.items() if state[name] != present]
    refused = [name for name in changed if name == "base" or not override]
    if refused:
        name = refused[0]
        remedy = "start over with --fresh"
        if name != "base":
            remedy = "continue all the same with --override, or start over with --fresh"
        raise RunFolderError(
            f"{path}: belongs to another {name} ({state[name][:12]}, now {fingerprints[name][:12]}); {remedy}"
        )
    finished = targets[: _num_finished(state)]
    recorded = state.get("finished_sha256") or _names_sha256(state["finished"])  # earlier versions named them all
    if recorded != _names_sha256(finished):
        begins = ", ".join(shortlist(targets))
        raise RunFolderError(
            f"{path}: has finished {named_finished(state)}, and the configuration begins with {begins}: keep finished "
            "concepts in their place, or start over with --fresh"
        )
    return bool(changed)


def finished_concepts(targets: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint records of the concepts before it, whatever their number: the last names, and a checksum."""
    return {"num_finished": len(targets), "finished": list(targets[-NAMED:]), "finished_sha256": _names_sha256(targets)}


def _num_finished(state: Mapping[str, Any]) -> int:
    """How many concepts a checkpoint has finished; earlier versions trained none together."""
    return int(state.get("num_finished", state["concept"]))


def _names_sha256(names: Sequence[str]) -> str:
    return text_sha256(json.dumps(list(names)))


def named_finished(state: Mapping[str, Any]) -> str:
    """The finished concepts of a checkpoint in words."""
    names, number = state["finished"], _num_finished(state)
    return ", ".join(names) if number <= len(names) else f"{number:,} concepts, the last of them {names[-1]}"
