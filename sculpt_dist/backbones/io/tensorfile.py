"""Safetensors files: headers read without the content."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sculpt_dist.core.errors import ModelError
from sculpt_dist.core.messages import shown
from sculpt_dist.core.tensorfile import DTYPES, Entry

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
WRAPPERS = re.compile(r"^(module\.)+|_orig_mod\.")  # what DataParallel and torch.compile put into a weight's name
PICKLED = (".ckpt", ".bin", ".pt", ".pth")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # of files of torch.save: zip, pickle


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
