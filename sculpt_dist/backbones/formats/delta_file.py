"""The file format of a delta: what its header says, and how it is read.

A delta is a safetensors file. Per changed tensor it holds the XOR of the base's and the result's bits, both in the
base's stored dtype, as integers of that width (U8, I16, I32, I64) in the tensor's shape.

The header's metadata: format, version, net ("unet" or "transformer"), pipeline (its class), tensors: a JSON object
{name: {dtype, base, result}} with the sha256 of the bytes on both sides, surroundings: a JSON object {component:
sha256} of what the delta depends on and does not change, card: the model card of the result, checksums: of the tensors
in the file, sha256: of the other metadata. The last four are missing in deltas of earlier versions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from sculpt_dist.backbones.formats.stored_net import sha256_of
from sculpt_dist.backbones.io.tensorfile import entries
from sculpt_dist.core.errors import ModelError
from sculpt_dist.core.files import is_intact
from sculpt_dist.core.messages import shown
from sculpt_dist.core.tensorfile import DTYPES

FORMAT, VERSION = "sculpt-dist delta", "1"
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by width in bytes; these dtypes have XOR


class Change(NamedTuple):
    """One changed tensor: the base's dtype (its safetensors label), and the sha256 of the bytes on both sides."""

    dtype: str
    base: str
    result: str


class Delta(NamedTuple):
    """The metadata of a delta file."""

    file: Path
    pipeline: str
    net: str
    changes: dict[str, Change]
    surroundings: dict[str, str]  # by component; empty in deltas of earlier versions
    card: str  # empty where the model had none


def read_delta(file: Path) -> Delta:
    """The metadata of a delta file; only its header is read.

    Raises ModelError when the file is no delta, of another version, or damaged.
    """
    held = {entry.name: entry for entry in entries(file)}
    metadata = file_metadata(file) or {}
    if metadata.get("format") != FORMAT:
        raise ModelError(
            f"{file}: is no delta (its format is {shown(metadata.get('format'))!r}, not {FORMAT!r}); give a file "
            "that was written as one"
        )
    if metadata.get("version") != VERSION:
        raise ModelError(
            f"{file}: is a delta of version {shown(metadata.get('version'))}, this program reads version {VERSION}; "
            "update sculpt-dist"
        )
    try:
        changes = {name: Change(**change) for name, change in json.loads(metadata["tensors"]).items()}
        planned = {name: bits_dtype(change) for name, change in changes.items()}
        surroundings = {str(name): str(sha) for name, sha in json.loads(metadata.get("surroundings", "{}")).items()}
        delta = Delta(file, metadata["pipeline"], metadata["net"], changes, surroundings, metadata.get("card", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{file}: its metadata is damaged ({type(error).__name__}: {shown(error)}); copy or download it again"
        ) from error
    if not changes or planned != {name: entry.dtype for name, entry in held.items()}:
        raise ModelError(f"{file}: is damaged, its tensors are not those of its metadata; copy or download it again")
    return delta


def is_delta_intact(file: Path) -> bool | None:
    """Whether a delta's metadata and tensors are as they were written.

    None where the file is no delta, or an earlier version wrote it without checksums.
    """
    metadata = file_metadata(file) or {}
    intact = is_intact(metadata)
    if metadata.get("format") != FORMAT or not intact:
        return intact
    checksums = json.loads(metadata["checksums"])
    with safe_open(file, "pt") as content:
        return all(sha256_of(content.get_tensor(name)) == checksums.get(name) for name in content.keys())  # noqa: SIM118


def file_metadata(file: Path) -> dict[str, str] | None:
    """The metadata of a safetensors file; None if it has none."""
    with safe_open(file, "pt") as content:
        return content.metadata()


def bits_dtype(change: Change) -> torch.dtype:
    """The type of the integers that hold a change."""
    return BITS[DTYPES[change.dtype].itemsize]
