"""Finds, verifies and reads the checkpoints that `save.py` writes. No pickle is written or read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.core.files import by_number, file_sha256
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.sharding.shards import Shard

MANIFEST = "manifest.json"
LATEST = "latest"  # only a hint: `newest` takes the newest checkpoint that verifies
SCHEMA = 2
NAME = re.compile(r"step-\d+-\d+")


def newest(folder: Path, group: Group) -> tuple[Path, Any] | None:
    """The newest checkpoint that verifies, and its state; rank 0 decides for all. None when none was ever written.

    Raises RunFolderError when checkpoints exist, or existed, but none verifies.
    """

    def choose() -> tuple[str, Any, list[str]] | None:
        damaged: list[str] = []
        for path in reversed(written(folder)):
            state, reason = verify(path)
            if reason is None:
                return str(path), state, damaged
            damaged.append(f"{path.name}: {reason}")
        if (folder / LATEST).exists() and not damaged:
            damaged.append("those that were written are gone")
        return ("", None, damaged) if damaged else None

    found = group.from_first(choose() if group.is_first else None)
    if found is None:
        return None
    path, state, damaged = found
    if not path:
        raise RunFolderError(f"{folder}: no checkpoint can be trusted ({'; '.join(damaged)}); start over with --fresh")
    if damaged and group.is_first:
        print(f"skipped damaged checkpoints: {'; '.join(damaged)}", flush=True)
    return Path(path), state


def written(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first; a user's copies under other names are none."""
    return sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), key=by_number)


def set_aside_later(path: Path) -> None:
    """Rename the checkpoints newer than `path`: they did not verify, so the saver must not count them as kept."""
    for damaged in written(path.parent):
        if by_number(damaged) > by_number(path):
            os.rename(damaged, damaged.with_name(f"damaged-{damaged.name}-{os.getpid()}"))


def verify(path: Path) -> tuple[Any, str | None]:
    """(state, None) when the manifest and every file are intact, otherwise (None, what is wrong)."""
    if (path / MANIFEST).is_symlink():
        return None, "its manifest is a symbolic link"
    try:
        sealed = json.loads((path / MANIFEST).read_bytes())
        text = sealed["body"]
        if hashlib.sha256(text.encode()).hexdigest() != sealed["seal"]:
            return None, "its manifest was changed"
        body = json.loads(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"its manifest cannot be read ({type(error).__name__})"
    if body["schema"] != SCHEMA:
        return None, f"its manifest has schema {body['schema']}, this version reads {SCHEMA}"
    for name, entry in body["files"].items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            return None, f"{name} is missing"
        if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
            return None, f"{name} was changed or truncated"
    return body["state"], None


def load(path: Path, shards: Sequence[Shard], extra: Sequence[str]) -> dict[str, list[Tensor]]:
    """Fill the shards from a verified checkpoint of any number of ranks; returns the shards of the `extra` kinds.

    Slices are copied where they overlap. Weights go into the fp32 shards; the caller publishes them. Raises
    RunFolderError when the checkpoint lacks elements that this run needs.
    """
    filled = {kind: [torch.zeros_like(shard.flat) for shard in shards] for kind in extra}
    moments = [shard.moments.flat(shard.opened) for shard in shards]
    into = {
        "weight": [shard.flat for shard in shards],
        "saliency": [shard.saliency for shard in shards],
        "opened": [shard.opened for shard in shards],
        "momentum": [both[0] for both in moments],
        "variance": [both[1] for both in moments],
    } | filled
    wanted: dict[str, list[tuple[int, Any]]] = {}
    missing = 0
    for i, shard in enumerate(shards):
        for f in shard.fragments:
            wanted.setdefault(f.name, []).append((i, f))
            missing += f.numel * len(into)
    for kind, name, start, tensor in _slices(path):
        for i, f in wanted.get(name, []) if kind in into else []:
            low, high = max(start, f.start), min(start + tensor.numel(), f.start + f.numel)
            if low < high:
                at = f.offset + low - f.start
                into[kind][i][at : at + high - low] = tensor[low - start : high - start].to(into[kind][i].device)
                missing -= high - low
    if missing > 0:
        raise RunFolderError(
            f"{path}: lacks {missing} elements that this run needs; it belongs to another model or method"
        )
    for shard, both in zip(shards, moments):
        shard.moments.fill(*both, shard.opened)
    return filled


def load_named(path: Path, kind: str) -> dict[str, Tensor]:
    """The tensors of one kind that any rank saved as `named`, by name."""
    return {name: tensor for found, name, _, tensor in _slices(path) if found == kind}


def _slices(path: Path) -> Iterator[tuple[str, str, int, Tensor]]:
    from safetensors import safe_open

    files = sorted(path.glob("rank-*.safetensors"), key=lambda p: int(p.stem.split("-")[1]))
    seen = set()
    for file in files:
        with safe_open(file, "pt") as content:
            for key in content.keys():  # noqa: SIM118 (safe_open is not iterable)
                if key not in seen:  # in stage 0 every rank writes the same slices
                    seen.add(key)
                    kind, name, start = key.split("|")
                    yield kind, name, int(start), content.get_tensor(key)
