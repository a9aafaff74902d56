"""Writing checkpoints while the training goes on: files, fsync and checksums are another thread's work."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sculpt_dist.core.errors import NonFiniteError, RunFolderError, StopRequested
from sculpt_dist.core.files import file_sha256, sync, write_atomically
from sculpt_dist.engine.checkpoints.restore import LATEST, MANIFEST, SCHEMA
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.sharding.shards import Shard

KEPT = 2


class Saver:
    """Writes a run's checkpoints. While open (`with`), one may be under way; leaving as planned waits for it, leaving broken does not.

    A checkpoint is a directory written aside, synced, with a manifest of sizes and sha256, then renamed: it is there whole or not at
    all. The training waits for a copy of its state in memory, of the size of the state; with `background` false it waits for the
    files instead, and no copy is made.
    """

    def __init__(self, folder: Path, group: Group, background: bool = True) -> None:
        self.folder, self.group, self.background = folder, group, background
        self._store = (
            None if group.store is None else group.store.clone()
        )  # a connection of its own, for another thread
        self._thread: threading.Thread | None = None
        self._failed: str | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind in (None, StopRequested, NonFiniteError):  # what all ranks leave together by
            self.finish()

    def save(
        self,
        place: tuple[int, int],
        shards: Sequence[Shard],
        extra: Mapping[str, Sequence[Tensor]],
        state: Mapping[str, Any],
        named: Mapping[str, Tensor] = {},
    ) -> None:
        """Begin checkpoint `place` = (concept, step), the newest of the folder; all ranks enter. Waits for the one before.

        `extra`: kinds of flat tensors like the shards, which nobody changes from now on. `named`: further tensors of this rank as
        `kind|name|0`, for `load_named`. `state` is json. Raises RunFolderError on all ranks when the one before could not be written.
        """
        self.finish()
        aside = self.folder / f".writing-{place[0]:03d}-{place[1]:06d}"
        self.group.on_first(lambda: self._make(aside))
        tensors = _shard_tensors(shards, extra, copied=self.background) | {
            name: part.cpu().clone() for name, part in named.items()
        }
        if self.background:
            self._thread = threading.Thread(target=self._write, args=(aside, tensors, state), name="saver", daemon=True)
            self._thread.start()
        else:
            self._write(aside, tensors, state)

    def finish(self) -> None:
        """Wait until the last checkpoint is there, on all ranks. Raises RunFolderError on all of them when it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failed, self._failed = self._failed, None
        self.group.together(lambda: _refuse(failed))

    def _make(self, aside: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for debris in self.folder.glob(".writing-*"):
            shutil.rmtree(debris)
        aside.mkdir()

    def _write(self, aside: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """This rank's file, and on the first rank the rest; what fails is kept for `finish`."""
        try:
            entry = _write_part(aside / f"rank-{self.group.rank}.safetensors", tensors)
        except (OSError, SafetensorError) as error:
            entry = {
                "failed": f"{aside.parent}: a checkpoint could not be written: {error} ({_free(aside.parent)} free)"
            }
            self._failed = entry["failed"]
        if not self.group.is_first:
            self._store.set(f"{aside}/{self.group.rank}", json.dumps(entry))
            return
        try:
            entries = [entry, *(self._receive(f"{aside}/{rank}") for rank in range(1, self.group.size))]
            self._failed = next((e["failed"] for e in entries if "failed" in e), None)
            if self._failed is None:
                self._commit(aside, entries, state)
            else:
                shutil.rmtree(aside)
        except (OSError, RuntimeError) as error:  # the store's own, when a rank's word does not come, is a RuntimeError
            self._failed = f"{aside.parent}: a checkpoint could not be written: {error} ({_free(aside.parent)} free)"

    def _receive(self, key: str) -> dict[str, Any]:
        entry = json.loads(self._store.get(key))  # waits for it
        self._store.delete_key(key)
        return entry

    def _commit(self, aside: Path, entries: Sequence[Mapping[str, Any]], state: Mapping[str, Any]) -> None:
        files = {entry["name"]: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for entry in entries}
        text = json.dumps({"schema": SCHEMA, "state": state, "files": files}, indent=1, sort_keys=True)
        sealed = {"seal": hashlib.sha256(text.encode()).hexdigest(), "body": text}
        write_atomically(aside / MANIFEST, json.dumps(sealed).encode())
        sync(aside)
        final = aside.with_name(aside.name.replace(".writing-", "step-"))
        if final.exists():
            shutil.rmtree(final)
        os.rename(aside, final)
        sync(self.folder)
        write_atomically(self.folder / LATEST, final.name.encode())
        for old in sorted(self.folder.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old)


def _shard_tensors(shards: Sequence[Shard], extra: Mapping[str, Sequence[Tensor]], copied: bool) -> dict[str, Tensor]:
    """This rank's state as `kind|name|start` -> slice of a parameter, on the CPU; `copied`: what the training changes is."""
    tensors = {}
    for i, shard in enumerate(shards):
        momentum, variance = shard.moments.flat(shard.opened)
        changing = {"weight": shard.flat, "saliency": shard.saliency, "opened": shard.opened}
        fixed = {kind: flats[i] for kind, flats in extra.items()}
        (fixed if shard.moments.packed else changing).update(momentum=momentum, variance=variance)
        kinds = {kind: flat.to("cpu", copy=copied) for kind, flat in changing.items()} | {
            kind: flat.cpu() for kind, flat in fixed.items()
        }
        for f in shard.fragments:
            tensors |= {f"{kind}|{f.name}|{f.start}": flat[f.here] for kind, flat in kinds.items()}
    return tensors


def _write_part(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    save_file(dict(tensors), file)
    os.chmod(file, 0o644)
    sync(file)
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file)}


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB"


def _refuse(failed: str | None) -> None:
    if failed is not None:
        raise RunFolderError(f"{failed}; the checkpoints before it stay")
