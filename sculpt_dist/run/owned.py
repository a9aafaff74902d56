"""What this program may remove or replace in a run folder: only what it wrote itself.

A model folder is known by the checksums that were written with it. What cannot be proven to be the run's own is renamed
to `NAME.kept-N`, never removed.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from sculpt_dist.backbones.io.folders import CHECKSUMS
from sculpt_dist.core.files import file_sha256, write_atomically

RECORD = ".model-written"  # in the run folder: the sha256 of the CHECKSUMS of the model that the run wrote
UNPROVEN = ("model.safetensors", "delta.safetensors", "kohya.safetensors", "lora")  # a user may have put them there
CARD = "README.md"  # is written later than the checksums


def record_model(model: Path) -> None:
    """Remember that the run wrote this folder."""
    write_atomically(model.parent / RECORD, file_sha256(model / CHECKSUMS).encode())


def make_room(path: Path) -> None:
    """Remove a file or folder of the run; rename a model folder that the run did not write."""
    if path.name == "model" and path.exists() and not _wrote(path):
        kept = _put_aside(path)
        print(f"{path}: was not written by this run, so it is kept as {kept}", flush=True)
    elif path.is_symlink():
        _empty(path)
    elif path.name in UNPROVEN and path.exists():
        print(f"{path}: is kept as {_put_aside(path)}", flush=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _wrote(model: Path) -> bool:
    """Whether a model folder is as this run wrote it, without further files."""
    checksums, record = model / CHECKSUMS, model.parent / RECORD
    if not model.is_dir():
        return False
    if not any(model.iterdir()):
        return True
    if not checksums.is_file():
        return False
    if record.is_file() and record.read_bytes() != file_sha256(checksums).encode():
        return False
    if not record.is_file() and not (model.parent / "manifest.json").is_file():  # earlier versions wrote no record
        return False
    lines = checksums.read_text(errors="replace").splitlines()
    listed = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
    found = {path.relative_to(model).as_posix(): path for path in model.rglob("*") if not path.is_dir()}
    return all(
        name in (CHECKSUMS, CARD) or (name in listed and file_sha256(path) == listed[name])
        for name, path in found.items()
    )


def _holds_checkpoints(folder: Path) -> bool:
    return all(
        re.fullmatch(r"step-\d+-\d+|damaged-step-.*|\.writing-.*|latest", path.name) for path in folder.iterdir()
    )


def _put_aside(path: Path) -> Path:
    path, number = path.resolve(), 1  # a link to it stays
    while (kept := path.with_name(f"{path.name}.kept-{number}")).exists():
        number += 1
    os.rename(path, kept)
    return kept


def _empty(link: Path) -> None:
    """Remove what the run wrote behind a link, and keep the link: it leads to another disk, as a rule.

    Where that is not known to be the run's, only the link goes.
    """
    if not link.is_dir() or not (link.name == "model" or (link.name == "checkpoints" and _holds_checkpoints(link))):
        link.unlink()
        return
    place = link.resolve()
    shutil.rmtree(place)
    place.mkdir()
