"""Safetensors files, header first: what a file holds without reading it, and writing one tensor at a time."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sculpt_dist.core.errors import ModelError

# The format, from its public description (github.com/huggingface/safetensors, README "Format"): 8 bytes of header length, little-endian;
# a JSON header {name: {dtype, shape, data_offsets}}, padded with spaces; then the tensors' bytes, row-major, without gaps.
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
MAX_HEADER_BYTES = 100_000_000  # what the safetensors library itself accepts
PICKLED = (".ckpt", ".bin", ".pt", ".pth")


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


def entries(file: Path) -> list[Entry]:
    """What a safetensors file holds, in the order of its bytes; only the header is read.

    Raises ModelError when the file is missing, is a pickle or anything else that is no safetensors, or is cut short.
    """
    if not file.is_file():
        raise ModelError(
            f"{file}: {'is a folder, not a file' if file.is_dir() else 'there is no such file'}; give a .safetensors file"
        )
    with file.open("rb") as content:
        start = content.read(9)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 9 or length > MAX_HEADER_BYTES or start[8:] != b"{":
            raise _no_safetensors(file, start)
        text = start[8:] + content.read(length - 1)
    size = file.stat().st_size
    if len(text) < length:
        raise ModelError(f"{file}: is cut short, within its header ({size} bytes are there); copy or download it again")
    try:
        found = sorted(_placed(name, value) for name, value in json.loads(text).items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{file}: its safetensors header is damaged ({type(error).__name__}: {error}); copy or download it again"
        ) from error
    end = 0
    for begin, stop, name, dtype, shape in found:
        if begin != end or stop - begin != Entry(name, DTYPES[dtype], shape).size:
            raise ModelError(f"{file}: is damaged, {name} does not lie where its shape says; copy or download it again")
        end = stop
    if size != 8 + length + end:
        state = "is cut short" if size < 8 + length + end else "is damaged"
        raise ModelError(
            f"{file}: {state}: {size} bytes are there, its header says {8 + length + end}; copy or download it again"
        )
    return [Entry(name, DTYPES[dtype], shape) for _, _, name, dtype, shape in found]


def _placed(name: str, value: dict[str, Any]) -> tuple[int, int, str, str, tuple[int, ...]]:
    begin, stop = value["data_offsets"]
    if value["dtype"] not in DTYPES:
        raise ValueError(f"{name} is stored as {value['dtype']}, none of {', '.join(DTYPES)}")
    return int(begin), int(stop), name, value["dtype"], tuple(int(length) for length in value["shape"])


def _no_safetensors(file: Path, start: bytes) -> ModelError:
    if file.suffix not in PICKLED and not start.startswith(
        (b"PK\x03\x04", b"\x80")
    ):  # how torch.save's files begin: zip, pickle
        return ModelError(f"{file}: is no safetensors file (it begins with {start[:8]!r}); copy or download it again")
    return pickled(file)


def pickled(file: Path) -> ModelError:
    """What is said of a file of pickled weights, with the command that converts it."""
    target = file.with_name(
        file.name.replace("pytorch_model", "model") if file.name.startswith("pytorch_model") else file.name
    )
    code = (
        "from torch import is_tensor, load; from safetensors.torch import save_file; "
        f"held = load({str(file)!r}, map_location='cpu', weights_only=True); held = held.get('state_dict', held); "
        "save_file({name: value.clone().contiguous() for name, value in held.items() if is_tensor(value)}, "
        f"{str(target.with_suffix('.safetensors'))!r})"
    )
    return ModelError(
        f"{file}: holds pickled weights, which can run code and are not read; convert it with: python -c {shlex.quote(code)}"
    )


class TensorWriter:
    """A safetensors file whose tensors arrive one by one, in any order; each lands at its place at once.

    The file is absent, as before, or complete: it is written aside, and `finish` renames it. Wrong calls are ValueErrors.
    """

    def __init__(self, file: Path, planned: Sequence[Entry], metadata: dict[str, str] | None = None) -> None:
        self.file, self._missing = file, {entry.name: entry for entry in planned}
        if len(self._missing) != len(planned):
            raise ValueError(f"{file}: the plan names a tensor twice")
        header, self._places = _header(planned, metadata)
        self._start = len(header)
        self._aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        self._out = self._aside.open("wb")
        self._out.write(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError when it is another tensor than planned, or came before."""
        came = Entry(name, tensor.dtype, tuple(tensor.shape))
        if self._missing.get(name) != came:
            raise ValueError(f"{self.file}: planned {self._missing.get(name)}, but {came} came")
        self._out.seek(self._start + self._places[name])
        self._out.write(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        del self._missing[name]

    def finish(self) -> None:
        """Raises ValueError when a planned tensor did not come."""
        if self._missing:
            raise ValueError(
                f"{self.file}: {len(self._missing)} planned tensors did not come, first {next(iter(self._missing))}"
            )
        self._out.flush()
        os.fsync(self._out.fileno())
        self._out.close()
        os.replace(self._aside, self.file)

    def abandon(self) -> None:
        """Leave nothing behind, where `finish` was not reached."""
        self._out.close()
        self._aside.unlink(missing_ok=True)


def write_tensors(
    file: Path, planned: Sequence[Entry], tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file from tensors that arrive one by one; each is dropped before the next is asked for.

    The file is absent, as before, or complete. Raises ValueError when a tensor is another than planned, or does not come.
    """
    writer = TensorWriter(file, planned, metadata)
    try:
        for name, tensor in tensors:
            writer.write(name, tensor)
            del tensor  # the next one may be as big
        writer.finish()
    finally:
        writer.abandon()


def _header(planned: Sequence[Entry], metadata: dict[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and each tensor's place after them. Wider types come first, so that every tensor is aligned to its type."""
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
