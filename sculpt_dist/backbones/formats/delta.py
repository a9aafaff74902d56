"""Delta files: only the denoiser's tensors that a run changed; one is applied to the base model, and removed again, bit for bit.

A delta is a safetensors file. For each changed tensor it holds the XOR of the bit patterns of the base's tensor and of the result, both
in the base's stored dtype, as integers of that width (U8, I16, I32, I64) in the tensor's shape: applying and removing are the same
operation, and exact for every pattern, NaN and -0 included. The header's metadata: format, version, net ("unet", "transformer"),
pipeline (its class), and tensors, a JSON object {name: {dtype, base, result}} with the sha256 of both sides' bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from sculpt_dist.backbones.io.folders import is_named, read_json, variant_of, weight_files
from sculpt_dist.backbones.io.tensorfile import DTYPES, LABELS, PICKLED, Entry, entries, pickled, write_tensors
from sculpt_dist.backbones.io.writing import COPIED
from sculpt_dist.core.errors import ModelError

FORMAT, VERSION = "sculpt-dist delta", "1"
NETS = ("unet", "transformer")
BITS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # by width in bytes: those of tensorfile.DTYPES that have XOR


class Change(NamedTuple):
    """One changed tensor: the base's dtype under its safetensors label, and the sha256 of the bytes on both sides."""

    dtype: str
    base: str
    result: str


class Delta(NamedTuple):
    """What a delta file says of itself."""

    file: Path
    pipeline: str
    net: str
    changes: dict[str, Change]


class Net:
    """The denoiser of a pipeline folder: headers are read at once, a tensor when asked for; files stay mapped until the stack ends.

    Raises ModelError when the folder is no pipeline with one denoiser, or its weights are missing, pickled, damaged, or there twice.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.pipeline, self.name = _kind(folder)
        self.part = folder / self.name
        self.files = weight_files(self.part)
        if not self.files:
            _refuse_pickles(self.part)
            raise ModelError(f"{self.part}: no .safetensors weights; fetch the component again")
        self.held: dict[str, Entry] = {}
        self._readers: dict[str, Any] = {}
        for file in self.files:
            found = entries(file)
            reader = stack.enter_context(safe_open(file, "pt"))
            for entry in found:
                if entry.name in self.held:
                    raise ModelError(
                        f"{file}: {entry.name} is also in another file there; keep one set of weights in the folder"
                    )
                self.held[entry.name], self._readers[entry.name] = entry, reader

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name].get_tensor(name)


def write_delta(base: Path, model: Path, file: Path) -> int:
    """Write what the denoiser of `model` changes in that of `base`, two pipeline folders; returns the number of changed tensors.

    A tensor that is equal to the base's in either side's dtype is unchanged: an export in another dtype than the base's has changed only
    what the run changed. Changed ones are cast to the base's stored dtype. A few tensors are in memory at a time; an existing file is
    replaced; it is absent, as before, or complete. Raises ModelError when the folders hold different classes or other tensors, nothing
    or something that is no float differs, or a changed value is too large for the base's dtype.
    """
    with ExitStack() as stack:
        ours, theirs = Net(base, stack), Net(model, stack)
        _check_alike(ours, theirs)
        if file.is_dir() or file.resolve() in {weights.resolve() for weights in ours.files + theirs.files}:
            raise ModelError(
                f"{file}: is {'a folder' if file.is_dir() else 'a weight file of one of the two models'}; name another file"
            )
        changes = {}
        for name in ours.held:
            result = _changed(name, ours, theirs)
            if result is not None:
                changes[name] = Change(LABELS[result.dtype], _sha256(ours[name]), _sha256(result))
        if not changes:
            raise ModelError(
                f"{model}: its {ours.name} is that of {base}, nothing was changed; give the unlearned model"
            )
        planned = [
            Entry(name, BITS[DTYPES[change.dtype].itemsize], ours.held[name].shape) for name, change in changes.items()
        ]
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "net": ours.name,
            "pipeline": ours.pipeline,
            "tensors": json.dumps({name: change._asdict() for name, change in changes.items()}),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        turned = ((name, _bits(ours[name]) ^ _bits(theirs[name].to(ours.held[name].dtype))) for name in changes)
        write_tensors(file, planned, turned, metadata)
    return len(changes)


def apply_delta(folder: Path, file: Path, output: Path, remove: bool = False) -> None:
    """Write `output`, the pipeline folder that `file` makes of its base `folder`; `remove`: the base, from the folder it was applied to.

    The denoiser keeps its files' names, sharding and dtypes; of the rest, what model_index.json names is copied byte for byte, without
    pickles. `output` must not exist; it is absent or complete. About one tensor is in memory at a time. Raises ModelError, before
    anything is written, when the delta is damaged, of another version or another base, or is applied already (`remove`: is not applied).
    """
    if output.exists():
        raise ModelError(f"{output}: exists already; name a folder that does not")
    delta = read_delta(file)
    with ExitStack() as stack:
        net = Net(folder, stack)
        change = stack.enter_context(safe_open(file, "pt"))
        _check_fits(net, delta, change, remove)
        copied = _copied(net)
        aside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        try:
            (aside / net.name).mkdir(parents=True)
            for source in copied:
                target = aside / source.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, target)
            for source in net.files:
                planned = entries(source)
                write_tensors(
                    aside / net.name / source.name, planned, _turned(net, planned, delta, change), _metadata(source)
                )
            aside.rename(output)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def read_delta(file: Path) -> Delta:
    """What a delta file says of itself; the header alone is read. Raises ModelError when it is none, of another version, or damaged."""
    held = {entry.name: entry for entry in entries(file)}
    said = _metadata(file) or {}
    if said.get("format") != FORMAT:
        raise ModelError(
            f"{file}: is no delta (its format is {said.get('format')!r}, not {FORMAT!r}); give a file that was written as one"
        )
    if said.get("version") != VERSION:
        raise ModelError(
            f"{file}: is a delta of version {said.get('version')}, version {VERSION} is read here; update sculpt-dist"
        )
    try:
        changes = {name: Change(**change) for name, change in json.loads(said["tensors"]).items()}
        planned = {name: BITS[DTYPES[change.dtype].itemsize] for name, change in changes.items()}
        delta = Delta(file, said["pipeline"], said["net"], changes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{file}: its metadata is damaged ({type(error).__name__}: {error}); copy or download it again"
        ) from error
    if not changes or planned != {name: entry.dtype for name, entry in held.items()}:
        raise ModelError(
            f"{file}: is damaged, it holds other tensors than its metadata names; copy or download it again"
        )
    return delta


def _kind(folder: Path) -> tuple[str, str]:
    """The class of the folder's pipeline, and its denoiser's name."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(
            f"{folder}: is no diffusers pipeline folder (no model_index.json); save one with pipeline.save_pretrained()"
        )
    content = read_json(index)
    nets = [name for name in NETS if is_named(content, name)]
    if len(nets) != 1:
        raise ModelError(
            f"{index}: names {' and '.join(nets) or 'no denoiser'}; a delta is of pipelines with one unet or transformer"
        )
    return str(content.get("_class_name")), nets[0]


def _refuse_pickles(part: Path) -> None:
    """Weights that are pickled and nothing else: a copy without them would not load."""
    for file in sorted(part.glob("*")):
        if file.suffix in PICKLED and not any(part.glob("*.safetensors")):
            raise pickled(file)


def _check_alike(ours: Net, theirs: Net) -> None:
    """Raises ModelError when two denoisers differ in more than their values and dtypes."""
    if (ours.pipeline, ours.name) != (theirs.pipeline, theirs.name):
        raise ModelError(
            f"{theirs.folder}: holds a {theirs.pipeline} with a {theirs.name}, {ours.folder} a {ours.pipeline} with a {ours.name}; "
            "give the base that the model was made from"
        )
    wrong = [f"missing {name}" for name in ours.held if name not in theirs.held]
    wrong += [f"unknown {name}" for name in theirs.held if name not in ours.held]
    both = [name for name in ours.held if name in theirs.held]
    for name in both:
        if ours.held[name].shape != theirs.held[name].shape:
            wrong.append(f"{name} is {theirs.held[name].shape}, not {ours.held[name].shape}")
    if wrong:
        raise ModelError(
            f"{theirs.part}: {len(wrong)} tensors are others than in {ours.part}: {'; '.join(wrong[:3])}; "
            "give the base that the model was made from"
        )


def _changed(name: str, ours: Net, theirs: Net) -> Tensor | None:
    """The model's tensor in the base's dtype, or None when it is unchanged."""
    before, after = ours[name], theirs[name]
    result = after.to(before.dtype)
    if _same(before, result) or _same(before.to(after.dtype), after):
        return None
    if not (before.is_floating_point() and after.is_floating_point()):
        raise ModelError(
            f"{theirs.part}: {name} differs from {ours.part}, and is no float; give the base that it was made from"
        )
    if before.dtype != after.dtype:
        lost = int(
            after[~result.float().isfinite()].float().isfinite().sum()
        )  # float: float8 has no isfinite of its own
        if lost:
            raise ModelError(
                f"{theirs.part}: {lost} values of {name} are too large for {before.dtype}, in which {ours.part} is stored; "
                "give that base in a wider dtype"
            )
    return result


def _check_fits(net: Net, delta: Delta, change: Any, remove: bool) -> None:
    """Raises ModelError unless every changed tensor is there, has the bytes that are asked for, and is turned into those promised."""
    if (net.pipeline, net.name) != (delta.pipeline, delta.net):
        raise ModelError(
            f"{delta.file}: is of another base: of the {delta.net} of a {delta.pipeline}, {net.folder} holds the {net.name} of a "
            f"{net.pipeline}; give the model that the delta was made from"
        )
    strange, turned = [], 0
    for name, (label, base, result) in delta.changes.items():
        if name not in net.held:
            raise ModelError(
                f"{delta.file}: is of another base: {net.part} lacks {name}; give the model that the delta was made from"
            )
        shape = tuple(change.get_slice(name).get_shape())
        if (DTYPES[label], shape) != net.held[name][1:]:
            raise ModelError(
                f"{delta.file}: is of another base: {name} is {label} {shape} there, {LABELS[net.held[name].dtype]} "
                f"{net.held[name].shape} in {net.part}; give the model that the delta was made from, as it was stored"
            )
        before, after = (result, base) if remove else (base, result)
        found = _sha256(net[name])
        if found != before:
            strange.append(name)
            turned += found == after
        elif _sha256(_bits(net[name]) ^ change.get_tensor(name)) != after:
            raise ModelError(
                f"{delta.file}: is damaged, {name} does not give what its metadata says; copy or download it again"
            )
    if turned == len(delta.changes):
        state = "is not applied to it" if remove else "is already applied to it"
        raise ModelError(f"{net.folder}: {delta.file} {state}; use the folder as it is")
    if strange:
        raise ModelError(
            f"{delta.file}: is of another base: in {net.part}, {len(strange)} of its {len(delta.changes)} tensors hold other values "
            f"({', '.join(strange[:3])}); give the model it {'was applied to' if remove else 'was made from'}; if another delta was "
            "applied since, remove that one first"
        )


def _copied(net: Net) -> list[Path]:
    """The files of the folder that stay as they are. Raises ModelError when a component's weights are pickled only."""
    index = read_json(net.folder / "model_index.json")
    files = [
        file
        for file in net.folder.iterdir()
        if file.suffix in (".json", ".md", ".txt") or file.name in ("README", "LICENSE")
    ]
    for part in net.folder.iterdir():
        if part.is_dir() and part.name != net.name and is_named(index, part.name):
            if (
                part / "config.json"
            ).is_file():  # a model; what a tokenizer's folder has beside its files is not asked for
                _refuse_pickles(part)
            wanted = (*COPIED, ".safetensors", ".md")
            files += [file for file in part.iterdir() if file.suffix in wanted or file.name in ("README", "LICENSE")]
    variant = variant_of(net.part)
    files += [net.part / "config.json"]
    files += sorted(net.part.glob(f"*.safetensors.index{'.' + variant if variant else ''}.json"))[
        :1
    ]  # the one that weight_files reads
    return sorted(file for file in files if file.is_file())


def _turned(net: Net, planned: list[Entry], delta: Delta, change: Any) -> Iterator[tuple[str, Tensor]]:
    for name, dtype, _ in planned:
        tensor = net[name]
        yield name, (_bits(tensor) ^ change.get_tensor(name)).view(dtype) if name in delta.changes else tensor


def _metadata(file: Path) -> dict[str, str] | None:
    with safe_open(file, "pt") as content:
        return content.metadata()


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers of the same width: XOR and equality then see bit patterns, not values."""
    return tensor.contiguous().view(BITS[tensor.dtype.itemsize])


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(_bits(left), _bits(right))


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())).hexdigest()
