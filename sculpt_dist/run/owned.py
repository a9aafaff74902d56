"""What this program may remove or replace in a run folder: only what it wrote itself.

A model folder is known by the checksums that were written with it. What cannot be proven to be the run's own is renamed
to `NAME.kept-N`, never removed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sculpt_dist.backbones.io.folders import CHECKSUMS
from sculpt_dist.core.files import file_sha256, write_atomically

RECORD = ".model-written"  # in the run folder: the sha256 of the CHECKSUMS of the model that the run wrote
CARD = "README.md"  # is written later than the checksums


def record_model(model: Path) -> None:
    """Remember that the run wrote this folder."""
    write_atomically(model.parent / RECORD, file_sha256(model / CHECKSUMS).encode())


def make_room(path: Path) -> None:
    """Remove a file or folder of the run; rename a model folder that the run did not write."""
    if path.name == "model" and path.is_dir() and not _wrote(path):
        kept = _put_aside(path)
        print(f"{path}: was not written by this run, so it is kept as {kept}", flush=True)
    elif path.is_symlink():
        _empty(path)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _wrote(model: Path) -> bool:
    """Whether a model folder is as this run wrote it, without further files."""
    checksums, record = model / CHECKSUMS, model.parent / RECORD
    if not any(model.iterdir()):
        return True
    if not checksums.is_file():
        return False
    if record.is_file() and record.read_text() != file_sha256(checksums):
        return False
    if not record.is_file() and not (model.parent / "manifest.json").is_file():  # earlier versions wrote no record
        return False
    listed = {line.partition("  ")[2] for line in checksums.read_text().splitlines()}
    found = {path.relative_to(model).as_posix() for path in model.rglob("*") if not path.is_dir()}
    return found <= {*listed, CHECKSUMS, CARD}


def _put_aside(path: Path) -> Path:
    path, number = path.resolve(), 1  # a link to it stays
    while (kept := path.with_name(f"{path.name}.kept-{number}")).exists():
        number += 1
    os.rename(path, kept)
    return kept


def _empty(link: Path) -> None:
    """Remove what a link leads to, and keep the link: it leads to another disk, as a rule."""
    if not link.is_dir():
        link.unlink()
        return
    place = link.resolve()
    shutil.rmtree(place)
    place.mkdir()
