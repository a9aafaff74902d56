"""Shards: webdataset tars of latents with an offset index, written atomically and read by position; no pickle is ever read."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sculpt_dist.core.errors import ShardError
from sculpt_dist.core.files import file_sha256, write_atomically

MEMBERS = ("latent.npy", "json")  # of each sample; nothing else may lie in a shard
INDEX = "index.json"


@dataclass(frozen=True)
class ShardRecord:
    """What the index says of a shard; `offsets` is [sample][member] = (offset, size) in the tar."""

    name: str
    first: int  # sample id of its first sample
    count: int
    bytes: int
    sha256: str
    offsets: list[list[tuple[int, int]]]


@dataclass(frozen=True)
class Sample:
    latent: Tensor  # [C, H, W]
    prompt: str
    key: int
    size_ids: tuple[int, ...] | None = None  # SDXL: original size, crop, target size


def write_shard(folder: Path, name: str, samples: Sequence[Sample]) -> ShardRecord:
    """Write one tar aside and rename it; samples have consecutive ids."""
    import webdataset

    aside = folder / f".{name}.{os.getpid()}.tmp"
    with webdataset.TarWriter(str(aside), encoder=False, mtime=0, user="", group="") as writer:
        for sample in samples:
            buffer = io.BytesIO()
            np.save(buffer, sample.latent.float().cpu().numpy(), allow_pickle=False)
            about = {"key": sample.key, "prompt": sample.prompt}
            about |= {} if sample.size_ids is None else {"size_ids": list(sample.size_ids)}
            writer.write(
                {"__key__": f"{sample.key:08d}", "latent.npy": buffer.getvalue(), "json": json.dumps(about).encode()}
            )
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    record = scan_shard(aside, name, samples[0].key)
    os.replace(aside, folder / name)
    return record


def scan_shard(path: Path, name: str, first: int) -> ShardRecord:
    """Read a tar's directory. Raises ShardError when it is cut, or holds a member that a shard may not hold."""
    offsets: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if not member.isfile() or not re.fullmatch(r"\d{8}", key) or kind not in MEMBERS:
                    raise ShardError(
                        f"{path}: holds {member.name!r}; a shard holds only NNNNNNNN.latent.npy and NNNNNNNN.json"
                    )
                offsets.setdefault(key, {})[kind] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ShardError(f"{path}: is no readable tar ({error}); remove it and call prepare again") from error
    if not offsets:
        raise ShardError(f"{path}: holds no samples; remove it and call prepare again")
    for key, members in offsets.items():
        if set(members) != set(MEMBERS):
            raise ShardError(
                f"{path}: sample {key} lacks {sorted(set(MEMBERS) - set(members))}; remove it and call prepare again"
            )
    rows = [[members[kind] for kind in MEMBERS] for members in offsets.values()]
    return ShardRecord(name, first, len(rows), path.stat().st_size, file_sha256(path), rows)


def write_index(folder: Path, recipe: Mapping[str, Any], records: Iterable[ShardRecord]) -> None:
    """The index says how the shards were made, and each one's count, size and checksum."""
    content = {"recipe": dict(recipe), "shards": [asdict(record) for record in sorted(records, key=lambda r: r.first)]}
    write_atomically(folder / INDEX, json.dumps(content, indent=1).encode())


def read_index(folder: Path) -> tuple[dict[str, Any], list[ShardRecord]]:
    """(recipe, records). Raises ShardError when the index is missing or damaged."""
    try:
        content = json.loads((folder / INDEX).read_bytes())
        return content["recipe"], [ShardRecord(**record) for record in content["shards"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{folder / INDEX}: is missing or damaged ({type(error).__name__}); call prepare again"
        ) from error


def damage(folder: Path, record: ShardRecord, deep: bool = True) -> str | None:
    """What is wrong with a shard, or None; `deep` compares the checksum too."""
    path = folder / record.name
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != record.bytes:
        return f"{path} has {size} bytes, the index says {record.bytes}"
    if deep and file_sha256(path) != record.sha256:
        return f"{path} does not have the checksum that the index says"
    return None


class ShardReader:
    """Samples of one stream by position, read with the index's offsets; safe to hand to loader workers."""

    def __init__(self, folder: Path) -> None:
        """Raises ShardError when a shard is missing, cut or changed; the message says which."""
        self.folder = folder
        self.recipe, self.records = read_index(folder)
        for record in self.records:
            wrong = damage(folder, record)
            if wrong:
                raise ShardError(f"{wrong}; call prepare again, which redraws what is not whole")
        self.where = [(i, j) for i, record in enumerate(self.records) for j in range(record.count)]
        if not self.where:
            raise ShardError(f"{folder}: holds no samples; call prepare again")
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, position: int) -> Sample:
        i, j = self.where[position]
        latent, about = (self._read(i, tuple(span)) for span in self.records[i].offsets[j])
        try:
            array = np.load(io.BytesIO(latent), allow_pickle=False)
            content = json.loads(about)
        except ValueError as error:
            raise ShardError(
                f"{self.folder / self.records[i].name}: sample {j} is damaged ({error}); call prepare again"
            ) from error
        if array.dtype != np.float32 or array.ndim != 3 or not np.isfinite(array).all():
            raise ShardError(
                f"{self.folder / self.records[i].name}: sample {j} is no finite float32 [C, H, W] latent; call prepare again"
            )
        sizes = content.get("size_ids")
        return Sample(
            torch.from_numpy(array), content["prompt"], content["key"], None if sizes is None else tuple(sizes)
        )

    def _read(self, shard: int, span: tuple[int, int]) -> bytes:
        if shard not in self._files:
            self._files[shard] = os.open(self.folder / self.records[shard].name, os.O_RDONLY)
        return os.pread(self._files[shard], span[1], span[0])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}
