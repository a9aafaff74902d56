"""Writes checkpoints in a background thread, which handles files, fsync and checksums while training continues."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from sculpt_dist.core.errors import NonFiniteError, RunFolderError, StopRequested, WriteError
from sculpt_dist.core.files import free_space, sync, write_atomically, writing
from sculpt_dist.core.tensorfile import Entry, write_tensors
from sculpt_dist.engine.checkpoints.restore import LATEST, MANIFEST, SCHEMA, written
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.sharding.shards import Shard

KEPT = 2


class Saver:
    """Writes a run's checkpoints, one at a time.

    Leaving the context (`with`) waits for the checkpoint under way, except after an unexpected error.

    A checkpoint is a directory: written under a temporary name with a manifest of sizes and sha256, synced, then
    renamed. So it exists completely or not at all. Training waits only while its state is copied in memory; with
    `background` false it waits for the files instead, and no copy is made.
    """

    def __init__(self, folder: Path, group: Group, background: bool = True) -> None:
        self.folder, self.group, self.background = folder, group, background
        self._store: Any = None if group.store is None else group.store.clone()  # a connection for the other thread
        self._thread: threading.Thread | None = None
        self._failed: str | None = None
        self.began = self.resumed = time.monotonic()  # when the last checkpoint began, and training went on after it
        self.seconds = 0.0  # from its begin until its files were complete, in the background or not
        if group.is_first:  # what a kill left behind
            self._remove_partial()
            self._remove_old()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind in (None, StopRequested, NonFiniteError):  # these reach all ranks together
            self.finish()

    def save(
        self,
        place: tuple[int, int],
        shards: Sequence[Shard],
        extra: Mapping[str, Sequence[Tensor]],
        state: Mapping[str, Any],
        named: Mapping[str, Tensor] = {},
    ) -> None:
        """Start the checkpoint of `place` = (concept, step), after the previous one is done. All ranks must call this.

        `extra` holds flat tensors shaped like the shards, by kind; they must not change from now on. `named` holds
        further tensors of this rank under `kind|name|0`, for `load_named`. `state` is saved as JSON. Raises
        RunFolderError, on all ranks, when the previous checkpoint could not be written.
        """
        self.finish()
        self.began = time.monotonic()
        partial = self.folder / f".writing-{place[0]:03d}-{place[1]:06d}"
        self.group.on_first(lambda: self._create(partial))
        tensors = _shard_tensors(shards, extra, copied=self.background)
        tensors |= {name: part.cpu().clone() for name, part in named.items()}
        if self.background:
            self._thread = threading.Thread(
                target=self._write, args=(partial, tensors, state), name="saver", daemon=True
            )
            self._thread.start()
        else:
            self._write(partial, tensors, state)
        self.resumed = time.monotonic()

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the last checkpoint. Raises RunFolderError, on all ranks, when it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failed, self._failed = self._failed, None
        self.group.together(lambda: _raise_if_failed(failed))

    def _create(self, partial: Path) -> None:
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)  # a run folder that was deleted does not come back
            self._remove_partial()
            partial.mkdir()

    def _remove_partial(self) -> None:
        for partial in self.folder.glob(".writing-*"):
            shutil.rmtree(partial)

    def _remove_old(self) -> None:
        for old in written(self.folder)[:-KEPT]:
            shutil.rmtree(old)

    def _write(self, partial: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write this rank's file, and on rank 0 everything else; a failure is kept for `finish` to raise."""
        try:
            self._write_files(partial, tensors, state)
        finally:
            self.seconds = time.monotonic() - self.began

    def _write_files(self, partial: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        try:
            entry = _write_part(partial / f"rank-{self.group.rank}.safetensors", tensors)
        except OSError as error:
            self._failed = _failure(partial.parent, error)
            entry = {"failed": self._failed}
        if not self.group.is_first:
            self._store.set(f"{partial}/{self.group.rank}", json.dumps(entry))
            return
        try:
            entries = [entry, *(self._receive(f"{partial}/{rank}") for rank in range(1, self.group.size))]
            self._failed = next((e["failed"] for e in entries if "failed" in e), None)
            if self._failed is None:
                self._commit(partial, entries, state)
            else:
                shutil.rmtree(partial)
        except (OSError, RuntimeError) as error:  # the store raises RuntimeError when a rank does not report
            self._failed = _failure(partial.parent, error)

    def _receive(self, key: str) -> dict[str, Any]:
        entry = json.loads(self._store.get(key))  # blocks until the rank reports
        self._store.delete_key(key)
        return entry

    def _commit(self, partial: Path, entries: Sequence[Mapping[str, Any]], state: Mapping[str, Any]) -> None:
        files = {entry["name"]: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for entry in entries}
        text = json.dumps({"schema": SCHEMA, "state": state, "files": files}, indent=1, sort_keys=True)
        sealed = {"seal": hashlib.sha256(text.encode()).hexdigest(), "body": text}
        write_atomically(partial / MANIFEST, json.dumps(sealed).encode())
        sync(partial)
        final = partial.with_name(partial.name.replace(".writing-", "step-"))
        if final.exists():
            shutil.rmtree(final)
        os.rename(partial, final)
        sync(self.folder)
        write_atomically(self.folder / LATEST, final.name.encode())
        self._remove_old()


def _shard_tensors(shards: Sequence[Shard], extra: Mapping[str, Sequence[Tensor]], copied: bool) -> dict[str, Tensor]:
    """This rank's state on the CPU, as `kind|name|start` -> slice. `copied`: copy what training will change."""
    tensors: dict[str, Tensor] = {}
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
    ordered = sorted(tensors.items(), key=lambda named: -named[1].element_size())  # as they lie in the file
    planned = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered]
    sha256 = write_tensors(file, planned, ordered)
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256}


def _failure(folder: Path, error: Exception) -> str:
    room = "" if isinstance(error, WriteError) else f" ({free_space(folder)})"  # which names it already
    return f"{folder}: a checkpoint could not be written: {error}{room}"


def _raise_if_failed(failed: str | None) -> None:
    if failed is not None:
        raise RunFolderError(f"{failed}; earlier checkpoints are kept")
