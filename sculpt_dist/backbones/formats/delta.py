"""Deltas: the denoiser's tensors that a run changed, to be applied to the base, or removed again (see `delta_file`).

Applying and removing are the same operation, exact for every pattern of the base's dtype, NaN and -0 included; a result
in a finer dtype is rounded first.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sculpt_dist.backbones.formats.about import About
from sculpt_dist.backbones.formats.about import metadata as metadata_of
from sculpt_dist.backbones.formats.delta_file import (
    BITS,
    FORMAT,
    VERSION,
    Change,
    Delta,
    bits_dtype,
    file_metadata,
    read_delta,
)
from sculpt_dist.backbones.formats.stored_net import StoredNet, refuse_pickles, sha256_of
from sculpt_dist.backbones.io.folders import is_named, pipeline_index, weight_indices
from sculpt_dist.backbones.io.tensorfile import entries
from sculpt_dist.backbones.io.writing import settings_files, write_checksums
from sculpt_dist.core.errors import ModelError
from sculpt_dist.core.files import copy_file, make_folder, sealed, written_aside
from sculpt_dist.core.tensorfile import DTYPES, LABELS, Entry, write_tensors

CARD, BASE_CARD = "README.md", "README-base.md"


def write_delta(base: Path, model: Path, file: Path, about: About | None = None) -> int:
    """Write how the denoiser of the pipeline folder `model` differs from that of `base`; returns the changed tensors.

    A tensor that equals the base's in the dtype of either side is unchanged, so an export in another dtype counts only
    what the run changed. Changed tensors are cast to the base's dtype. A few tensors are in memory at a time. The file
    is absent, as before, or complete. `about`: goes into the metadata. Raises ModelError when the
    folders hold different classes or tensors, when nothing or something other than a float differs, or a changed value
    overflows the base's dtype.
    """
    with ExitStack() as stack:
        before, after = StoredNet(base, stack), StoredNet(model, stack)
        _check_comparable(before, after)
        if file.is_dir() or file.resolve() in {weights.resolve() for weights in before.files + after.files}:
            found = "a folder" if file.is_dir() else "a weight file of one of the two models"
            raise ModelError(f"{file}: is {found}; name another file")
        changes, checksums = {}, {}
        for name in before.held:
            result = _changed(name, before, after)
            if result is not None:
                changes[name] = Change(LABELS[result.dtype], sha256_of(before[name]), sha256_of(result))
                checksums[name] = sha256_of(_bits(before[name]) ^ _bits(result))
        if not changes:
            raise ModelError(f"{model}: its {before.name} equals that of {base}; give the unlearned model")
        planned = [Entry(name, bits_dtype(change), before.held[name].shape) for name, change in changes.items()]
        metadata = {
            **metadata_of(about, base, "diffusers", "delta"),
            "format": FORMAT,
            "version": VERSION,
            "net": before.name,
            "pipeline": before.pipeline,
            "tensors": json.dumps({name: change._asdict() for name, change in changes.items()}),
            "surroundings": json.dumps(before.surroundings(changes)),
            "card": (model / CARD).read_text() if (model / CARD).is_file() else "",
            "checksums": json.dumps(checksums),
        }
        make_folder(file.parent)
        differences = ((name, _bits(before[name]) ^ _bits(after[name].to(before.held[name].dtype))) for name in changes)
        write_tensors(file, planned, differences, sealed(metadata))
    return len(changes)


def apply_delta(folder: Path, file: Path, output: Path, remove: bool = False) -> None:
    """Write `output`: the base `folder` with the delta applied, or (`remove`) the base of a `folder` that has it.

    The denoiser keeps the names, sharding and dtypes of its files. The other components that model_index.json names are
    copied byte for byte, without pickles. The model card is that of the unlearned model; the base's own is kept beside
    it, and comes back with `remove`. `output` must not exist; it is absent or complete. About one tensor is in memory
    at a time. Raises ModelError, before anything is written, when the delta is damaged, of another version or another
    base, or is applied already (`remove`: is not applied).
    """
    if output.exists():
        raise ModelError(f"{output}: exists already; name a folder that does not")
    delta = read_delta(file)
    with ExitStack() as stack:
        net = StoredNet(folder, stack)
        change = stack.enter_context(safe_open(file, "pt"))
        check_fits(net, delta, change, remove)
        result = partial(_applied, net, delta, change)
        write_changed(
            net, output, result, partial(_change_card, card=delta.card, remove=remove) if delta.card else None
        )


def write_changed(
    net: StoredNet, output: Path, result: Callable[[str], Tensor], change_card: Callable[[Path], None] | None
) -> None:
    """Write `output`, absent or complete: the folder of `net`, in which each tensor of the denoiser is its `result`."""
    copied = _copied(net)
    make_folder(output.parent)
    with written_aside(output) as aside:
        (aside / net.name).mkdir(parents=True)
        checksums = {}
        for source in copied:
            target = aside / source.relative_to(net.folder)
            target.parent.mkdir(exist_ok=True)
            checksums[target] = copy_file(source, target)
        for source in net.files:
            planned, target = entries(source), aside / net.name / source.name
            tensors = ((entry.name, result(entry.name)) for entry in planned)
            checksums[target] = write_tensors(target, planned, tensors, file_metadata(source))
        if change_card is not None:
            change_card(aside)
        # the cards have changed places
        write_checksums(aside, {file: sha256 for file, sha256 in checksums.items() if file.suffix != ".md"})


def _check_comparable(before: StoredNet, after: StoredNet) -> None:
    """Raises ModelError when two denoisers differ in more than values and dtypes."""
    if (before.pipeline, before.name) != (after.pipeline, after.name):
        raise ModelError(
            f"{after.folder}: holds a {after.pipeline} with a {after.name}, {before.folder} a {before.pipeline} with a "
            f"{before.name}; give the base that the model was made from"
        )
    wrong = [f"missing {name}" for name in before.held if name not in after.held]
    wrong += [f"unknown {name}" for name in after.held if name not in before.held]
    for name in [name for name in before.held if name in after.held]:
        if before.held[name].shape != after.held[name].shape:
            wrong.append(f"{name} is {after.held[name].shape}, not {before.held[name].shape}")
    if wrong:
        raise ModelError(
            f"{after.part}: {len(wrong)} tensors differ from {before.part} in name or shape: {'; '.join(wrong[:3])}; "
            "give the base that the model was made from"
        )


def _changed(name: str, before: StoredNet, after: StoredNet) -> Tensor | None:
    """The model's tensor in the base's dtype, or None when it is unchanged."""
    old, new = before[name], after[name]
    result = new.to(old.dtype)
    if _same(old, result) or _same(old.to(new.dtype), new):
        return None
    if not (old.is_floating_point() and new.is_floating_point()):
        raise ModelError(
            f"{after.part}: {name} differs from {before.part}, and is no float; give the base that it was made from"
        )
    if old.dtype != new.dtype:
        lost = int(new[~result.float().isfinite()].float().isfinite().sum())  # float8 has no isfinite of its own
        if lost:
            raise ModelError(
                f"{after.part}: {lost} values of {name} are too large for {old.dtype}, the dtype of {before.part}; "
                "give that base in a wider dtype"
            )
    return result


def check_fits(net: StoredNet, delta: Delta, change: Any, remove: bool) -> None:
    """Raises ModelError unless every changed tensor is there, and the delta turns its bytes into those promised."""
    other_base = f"{delta.file}: is of another base:"
    if (net.pipeline, net.name) != (delta.pipeline, delta.net):
        raise ModelError(
            f"{other_base} of the {delta.net} of a {delta.pipeline}, {net.folder} holds the {net.name} of a "
            f"{net.pipeline}; give the model that the delta was made from"
        )
    unexpected, turned = [], 0
    for name, (label, base, result) in delta.changes.items():
        if name not in net.held:
            raise ModelError(f"{other_base} {net.part} lacks {name}; give the model that the delta was made from")
        shape = tuple(change.get_slice(name).get_shape())
        held = net.held[name]
        if (DTYPES[label], shape) != (held.dtype, held.shape):
            raise ModelError(
                f"{other_base} {name} is {label} {shape} there, {LABELS[held.dtype]} {held.shape} in {net.part}; give "
                "the model that the delta was made from, as it was stored"
            )
        start, end = (result, base) if remove else (base, result)
        found = sha256_of(net[name])
        if found != start:
            unexpected.append(name)
            turned += found == end
        elif sha256_of(_bits(net[name]) ^ change.get_tensor(name)) != end:
            raise ModelError(
                f"{delta.file}: is damaged, {name} does not give what its metadata promises; copy or download it again"
            )
    if turned == len(delta.changes):
        state = "is not applied to it" if remove else "is already applied to it"
        raise ModelError(f"{net.folder}: {delta.file} {state}; use the folder as it is")
    if unexpected:
        wanted = "was applied to" if remove else "was made from"
        raise ModelError(
            f"{other_base} in {net.part}, {len(unexpected)} of its {len(delta.changes)} tensors hold other values "
            f"({', '.join(unexpected[:3])}); give the model that it {wanted}; if another delta was applied since, "
            "remove that one first"
        )
    found_around = net.surroundings(delta.changes) if delta.surroundings else {}
    other = [name for name, sha256 in delta.surroundings.items() if sha256 != found_around.get(name)]
    if other:
        raise ModelError(
            f"{other_base} in {net.folder}, {' and '.join(other)} hold other values where the delta changes none; give "
            "the base that it was made for; if another delta was applied since, remove that one first"
        )


def _copied(net: StoredNet) -> list[Path]:
    """The files that stay as they are. Raises ModelError when a component has pickled weights only."""
    index = pipeline_index(net.folder)
    documents = ("README", "LICENSE")
    files = [f for f in net.folder.iterdir() if f.suffix in (".json", ".md", ".txt") or f.name in documents]
    for part in net.folder.iterdir():
        if part.is_dir() and part.name != net.name and is_named(index, part.name):
            if (part / "config.json").is_file():  # a model; a tokenizer's folder may hold other files
                refuse_pickles(part)
            files += [*settings_files(part), *part.glob("*.safetensors"), *part.glob("*.safetensors.index.*json")]
            files += [file for file in part.iterdir() if file.suffix == ".md" or file.name in documents]
    files += [net.part / "config.json", *weight_indices(net.part)]
    return sorted(file for file in files if file.is_file())


def _change_card(folder: Path, card: str, remove: bool) -> None:
    """Put the unlearned model's card in place of the base's, or (`remove`) the base's back."""
    own, kept = folder / CARD, folder / BASE_CARD
    if remove:
        own.unlink(missing_ok=True)
    now, later = (kept, own) if remove else (own, kept)
    if now.exists():
        now.rename(later)
    if not remove:
        own.write_text(card)


def _applied(net: StoredNet, delta: Delta, change: Any, name: str) -> Tensor:
    tensor = net[name]
    return changed_bits(tensor, change.get_tensor(name)) if name in delta.changes else tensor


def changed_bits(tensor: Tensor, difference: Tensor) -> Tensor:
    """The tensor whose bits differ from those of `tensor` by `difference`, as a delta holds it."""
    return (_bits(tensor) ^ difference).view(tensor.dtype)


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers of the same width: XOR and equality then see bits, not values."""
    return tensor.contiguous().view(BITS[tensor.dtype.itemsize])


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(_bits(left), _bits(right))
