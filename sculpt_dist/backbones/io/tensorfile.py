"""Safetensors files: headers read without the content, and tensors written one at a time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sculpt_dist.core.errors import ModelError
from sculpt_dist.core.files import writing
from sculpt_dist.core.messages import shown

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
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
WRAPPERS = re.compile(r"^(module\.)+|_orig_mod\.")  # what DataParallel and torch.compile put into a weight's name
PICKLED = (".ckpt", ".bin", ".pt", ".pth")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # of files of torch.save: zip, pickle


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
    """The tensors of a safetensors file, in the order of their bytes; only the header is read.

    Raises ModelError when the file is missing, a pickle, no safetensors file, or cut short.
    """
    if not file.is_file():
        fault = "is a folder, not a file" if file.is_dir() else "there is no such file"
        raise ModelError(f"{file}: {fault}; give a .safetensors file")
    with file.open("rb") as content:
        start = content.read(9)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 9 or length > MAX_HEADER_BYTES or start[8:] != b"{":
            raise _not_safetensors(file, start)
        text = start[8:] + content.read(length - 1)
    size = file.stat().st_size
    if len(text) < length:
        raise ModelError(f"{file}: is cut short, within its header (it has {size} bytes); copy or download it again")
    try:
        found = sorted(_placed(name, value) for name, value in json.loads(text).items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        cause = f"{type(error).__name__}: {shown(error)}"
        raise ModelError(f"{file}: its safetensors header is damaged ({cause}); copy or download it again") from error
    end = 0
    for begin, stop, name, dtype, shape in found:
        if begin != end or stop - begin != Entry(name, DTYPES[dtype], shape).size:
            raise ModelError(f"{file}: is damaged, {name} is not where its shape says; copy or download it again")
        end = stop
    expected = 8 + length + end
    if size != expected:
        state = "is cut short" if size < expected else "is damaged"
        raise ModelError(f"{file}: {state}: it has {size} bytes, its header says {expected}; copy or download it again")
    try:
        with safe_open(file, "pt"):  # the library refuses more, such as metadata that is not text
            pass
    except SafetensorError as error:
        raise ModelError(f"{file}: is damaged ({shown(error)}); copy or download it again") from error
    return [Entry(name, DTYPES[dtype], shape) for _, _, name, dtype, shape in found]


def unwrapped(name: str) -> str:
    """A weight's name without what DataParallel and torch.compile put into it."""
    return WRAPPERS.sub("", name)


def _placed(name: str, value: dict[str, Any]) -> tuple[int, int, str, str, tuple[int, ...]]:
    begin, stop = value["data_offsets"]
    if value["dtype"] not in DTYPES:
        raise ValueError(f"{name} is stored as {value['dtype']}, which is none of {', '.join(DTYPES)}")
    return int(begin), int(stop), name, value["dtype"], tuple(int(length) for length in value["shape"])


def _not_safetensors(file: Path, start: bytes) -> ModelError:
    if file.suffix in PICKLED or start.startswith(PICKLE_STARTS):
        return pickled(file)
    return ModelError(f"{file}: is no safetensors file (it begins with {start[:8]!r}); copy or download it again")


def pickled(file: Path) -> ModelError:
    """The error for a file of pickled weights, with the command that converts it."""
    name = file.name
    if name.startswith("pytorch_model"):
        name = name.replace("pytorch_model", "model")
    target = file.with_name(name).with_suffix(".safetensors")
    code = (
        "from torch import is_tensor, load; from safetensors.torch import save_file; "
        f"held = load({str(file)!r}, map_location='cpu', weights_only=True); held = held.get('state_dict', held); "
        "save_file({name: value.clone().contiguous() for name, value in held.items() if is_tensor(value)}, "
        f"{str(target)!r})"
    )
    return ModelError(
        f"{file}: holds pickled weights, which can run code and are not read; convert it with: "
        f"python -c {shlex.quote(code)}"
    )


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, row-major; of a contiguous tensor on the CPU without a copy."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class TensorWriter:
    """Writes a safetensors file from tensors that arrive one by one, in any order.

    The file is absent, as before, or complete: it is written under a temporary name, which `finish` changes.
    """

    def __init__(self, file: Path, planned: Sequence[Entry], metadata: dict[str, str] | None = None) -> None:
        """Raises ValueError when the plan names a tensor twice."""
        self.file, self._missing = file, {entry.name: entry for entry in planned}
        if len(self._missing) != len(planned):
            raise ValueError(f"{file}: the plan names a tensor twice")
        header, self._places = _header(planned, metadata)
        self._start = len(header)
        self._aside = file.with_name(f".{file.name[:200]}.{os.getpid()}.tmp")
        with writing(file):
            self._out = self._aside.open("wb")
            self._out.write(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError when the tensor differs from the plan, or is written already; WriteError."""
        given = Entry(name, tensor.dtype, tuple(tensor.shape))
        if self._missing.get(name) != given:
            raise ValueError(f"{self.file}: planned {self._missing.get(name)}, got {given}")
        with writing(self.file):
            self._out.seek(self._start + self._places[name])
            self._out.write(raw_bytes(tensor))
        del self._missing[name]

    def finish(self) -> None:
        """Move the file into place. Raises ValueError when a planned tensor is missing; WriteError."""
        if self._missing:
            raise ValueError(
                f"{self.file}: {len(self._missing)} planned tensors are missing, first {next(iter(self._missing))}"
            )
        with writing(self.file):
            self._out.flush()
            os.fsync(self._out.fileno())
            self._out.close()
            os.replace(self._aside, self.file)

    def abandon(self) -> None:
        """Remove the temporary file, if `finish` did not move it."""
        with contextlib.suppress(OSError):  # what is buffered may not fit
            self._out.close()
        with contextlib.suppress(OSError):
            self._aside.unlink(missing_ok=True)


def write_tensors(
    file: Path, planned: Sequence[Entry], tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file from tensors that arrive one by one; each is dropped before the next is requested.

    The file is absent, as before, or complete. Raises ValueError when a tensor differs from the plan, or is missing.
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
