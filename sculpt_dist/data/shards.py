"""Shards: webdataset tars of latents with an index of offsets; written atomically, read by position, no pickle."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sculpt_dist.core.errors import ShardError
from sculpt_dist.core.files import file_sha256, write_atomically, written_aside

MEMBERS = ("latent.npy", "json")  # the files of each sample; a shard must not contain anything else
INDEX = "index.json"


@dataclass(frozen=True)
class ShardRecord:
    """A shard's entry in the index."""

    name: str
    first: int
    """Id of its first sample."""
    count: int
    """Number of samples."""
    bytes: int
    """Size of the file."""
    sha256: str
    offsets: list[list[tuple[int, int]]]
    """[sample][member]: (offset, size) in the tar."""


@dataclass(frozen=True)
class Sample:
    """One sample of a stream."""

    latent: Tensor  # [C, H, W]
    prompt: str
    key: int
    """Id within the stream."""
    size_ids: tuple[int, ...] | None = None
    """SDXL: original size, crop, target size."""


def write_shard(folder: Path, name: str, samples: Sequence[Sample]) -> ShardRecord:
    """Write one tar aside, then rename it. The samples must have consecutive ids. Raises WriteError."""
    import webdataset

    with written_aside(folder / name) as aside:
        with webdataset.TarWriter(str(aside), encoder=False, mtime=0, user="", group="") as writer:
            for sample in samples:
                buffer = io.BytesIO()
                np.save(buffer, sample.latent.float().cpu().numpy(), allow_pickle=False)
                content: dict[str, Any] = {"key": sample.key, "prompt": sample.prompt}
                if sample.size_ids is not None:
                    content["size_ids"] = list(sample.size_ids)
                writer.write(
                    {
                        "__key__": f"{sample.key:08d}",
                        "latent.npy": buffer.getvalue(),
                        "json": json.dumps(content).encode(),
                    }
                )
        return scan_shard(aside, name, samples[0].key)


def scan_shard(path: Path, name: str, first: int) -> ShardRecord:
    """Index a tar. Raises ShardError if it is truncated or contains a file that does not belong into a shard."""
    offsets: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if not member.isfile() or not re.fullmatch(r"\d{8}", key) or kind not in MEMBERS:
                    raise ShardError(
                        f"{path}: contains {member.name!r}; a shard contains only NNNNNNNN.latent.npy and NNNNNNNN.json"
                    )
                offsets.setdefault(key, {})[kind] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ShardError(f"{path}: is not a readable tar ({error}); remove it and run prepare again") from error
    if not offsets:
        raise ShardError(f"{path}: contains no samples; remove it and run prepare again")
    for key, members in offsets.items():
        if set(members) != set(MEMBERS):
            raise ShardError(
                f"{path}: sample {key} lacks {sorted(set(MEMBERS) - set(members))}; remove it and run prepare again"
            )
    rows = [[members[kind] for kind in MEMBERS] for members in offsets.values()]
    return ShardRecord(name, first, len(rows), path.stat().st_size, file_sha256(path), rows)


def write_index(folder: Path, recipe: Mapping[str, Any], records: Iterable[ShardRecord]) -> None:
    """Write the index: how the shards were made (`recipe`), and the count, size and checksum of each."""
    content = {"recipe": dict(recipe), "shards": [asdict(record) for record in sorted(records, key=lambda r: r.first)]}
    write_atomically(folder / INDEX, json.dumps(content, indent=1).encode())


def read_index(folder: Path) -> tuple[dict[str, Any], list[ShardRecord]]:
    """The index as (recipe, records). Raises ShardError if it is missing or damaged."""
    try:
        content = json.loads((folder / INDEX).read_bytes())
        return content["recipe"], [ShardRecord(**record) for record in content["shards"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{folder / INDEX}: is missing or damaged ({type(error).__name__}); run prepare again"
        ) from error


def damage(folder: Path, record: ShardRecord) -> str | None:
    """A description of a shard's damage, None if it is intact.

    A process compares the checksum once; later it looks at the size and the time of the last change.
    """
    path = folder / record.name
    if not path.is_file():
        return f"{path} is missing"
    about = path.stat()
    if about.st_size != record.bytes:
        return f"{path} has {about.st_size} bytes instead of the {record.bytes} of the index"
    state = (about.st_ino, about.st_mtime_ns, record.sha256)
    if _intact.get(path) != state:
        if file_sha256(path) != record.sha256:
            return f"{path} does not match its checksum in the index"
        _intact[path] = state
    return None


_intact: dict[Path, tuple[int, int, str]] = {}  # shards that matched their checksum, with their state then


class OpenFiles:
    """Keeps the files that were read last open: a long sequence has more shards than a process may have files."""

    def __init__(self, capacity: int = 64) -> None:
        self.capacity = capacity
        self._open: OrderedDict[Path, int] = OrderedDict()  # the file read last is the last

    def read(self, path: Path, offset: int, size: int) -> bytes:
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY)
        self._open.move_to_end(path)
        while len(self._open) > self.capacity:
            os.close(self._open.popitem(last=False)[1])
        return os.pread(self._open[path], size, offset)

    def forget(self, folder: Path) -> None:
        """Close the files of a folder: they may have been replaced."""
        for path in [path for path in self._open if path.parent == folder]:
            os.close(self._open.pop(path))


_files = OpenFiles()


class ShardReader:
    """Samples of one stream by position, read at the offsets of the index. Can be passed to loader workers."""

    def __init__(self, folder: Path) -> None:
        """Raises ShardError with the shard's name if one is missing, truncated or changed."""
        self.folder = folder
        self.recipe, self.records = read_index(folder)
        for record in self.records:
            wrong = damage(folder, record)
            if wrong is not None:
                raise ShardError(f"{wrong}; run prepare again, which redraws damaged shards")
        self.where = [(i, j) for i, record in enumerate(self.records) for j in range(record.count)]
        if not self.where:
            raise ShardError(f"{folder}: contains no samples; run prepare again")
        _files.forget(folder)

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, position: int) -> Sample:
        i, j = self.where[position]
        latent, about = (self._read(i, offset, size) for offset, size in self.records[i].offsets[j])
        try:
            array = np.load(io.BytesIO(latent), allow_pickle=False)
            content = json.loads(about)
        except ValueError as error:
            raise ShardError(
                f"{self.folder / self.records[i].name}: sample {j} is damaged ({error}); run prepare again"
            ) from error
        if array.dtype != np.float32 or array.ndim != 3 or not np.isfinite(array).all():
            raise ShardError(
                f"{self.folder / self.records[i].name}: sample {j} is not a finite float32 latent [C, H, W]; "
                "run prepare again"
            )
        sizes = content.get("size_ids")
        return Sample(
            torch.from_numpy(array), content["prompt"], content["key"], None if sizes is None else tuple(sizes)
        )

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        return _files.read(self.folder / self.records[shard].name, offset, size)
