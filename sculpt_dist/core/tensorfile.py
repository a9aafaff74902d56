"""Safetensors files, written one tensor at a time; their checksum is computed on the way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sculpt_dist.core.files import writing

# The format (github.com/huggingface/safetensors, README "Format"): 8 bytes of header length, little-endian; a JSON
# header {name: {dtype, shape, data_offsets}}, padded with spaces; then the tensors' bytes, row-major, without gaps.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LABELS = {dtype: label for label, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        count = self.dtype.itemsize
        for length in self.shape:
            count *= length
        return count


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, row-major; of a contiguous tensor on the CPU without a copy."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class TensorWriter:
    """Writes a safetensors file from tensors that arrive one by one, in any order, and computes its sha256.

    The file is absent, as before, or complete: it is written under a temporary name, which `finish` changes. Tensors in
    the order of the plan are hashed as they pass; one that arrives too early is read again once its turn comes.
    """

    def __init__(self, file: Path, planned: Sequence[Entry], metadata: dict[str, str] | None = None) -> None:
        """Raises ValueError when the plan names a tensor twice."""
        self.file, self._missing = file, {entry.name: entry for entry in planned}
        if len(self._missing) != len(planned):
            raise ValueError(f"{file}: the plan names a tensor twice")
        header, self._places = _header(planned, metadata)
        self._start = self._hashed = len(header)
        self._digest = hashlib.sha256(header)
        self._early: dict[int, int] = {}  # place -> size of each tensor that was written before its turn
        self._aside = file.with_name(f".{file.name[:200]}.{os.getpid()}.tmp")
        with writing(file):
            self._out = self._aside.open("w+b")
            self._out.write(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError when the tensor differs from the plan, or is written already; WriteError."""
        given = Entry(name, tensor.dtype, tuple(tensor.shape))
        if self._missing.get(name) != given:
            raise ValueError(f"{self.file}: planned {self._missing.get(name)}, got {given}")
        content, place = raw_bytes(tensor), self._start + self._places[name]
        with writing(self.file):
            if self._out.tell() != place:  # a seek writes out what is buffered
                self._out.seek(place)
            self._out.write(content)
            self._hash(place, content)
        del self._missing[name]

    def _hash(self, place: int, content: memoryview) -> None:
        if place != self._hashed:
            self._early |= {place: len(content)} if len(content) else {}
            return
        self._digest.update(content)
        self._hashed += len(content)
        while (size := self._early.pop(self._hashed, 0)) > 0:
            self._out.seek(self._hashed)
            self._digest.update(self._out.read(size))
            self._hashed += size

    def finish(self) -> str:
        """Move the file into place; returns its sha256.

        Raises ValueError when a planned tensor is missing; WriteError.
        """
        if self._missing:
            raise ValueError(
                f"{self.file}: {len(self._missing)} planned tensors are missing, first {next(iter(self._missing))}"
            )
        with writing(self.file):
            self._out.flush()
            os.fsync(self._out.fileno())
            self._out.close()
            os.replace(self._aside, self.file)
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Remove the temporary file, if `finish` did not move it."""
        with contextlib.suppress(OSError):  # what is buffered may not fit
            self._out.close()
        with contextlib.suppress(OSError):
            self._aside.unlink(missing_ok=True)


def write_tensors(
    file: Path, planned: Sequence[Entry], tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str] | None = None
) -> str:
    """Write a safetensors file from tensors that arrive one by one; each is dropped before the next is requested.

    Returns the file's sha256. The file is absent, as before, or complete. Raises ValueError when a tensor differs from
    the plan, or is missing.
    """
    writer = TensorWriter(file, planned, metadata)
    try:
        for name, tensor in tensors:
            writer.write(name, tensor)
            del tensor  # the next one may be as big
        return writer.finish()
    finally:
        writer.abandon()


def _header(planned: Sequence[Entry], metadata: dict[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and the place of each tensor after them.

    Wider types come first, so that every tensor is aligned to its type.
    """
    content: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    places, end = {}, 0
    for entry in sorted(planned, key=lambda entry: -entry.dtype.itemsize):
        places[entry.name] = end
        content[entry.name] = {
            "dtype": LABELS[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.size],
        }
        end += entry.size
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places
