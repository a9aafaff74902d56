"""What this program may remove or replace in a run folder: only what it wrote itself.

A model folder is known by the checksums that were written with it. What cannot be proven to be the run's own is renamed
to `NAME.kept-N`, never removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from sculpt_dist.backbones.io.folders import CHECKSUMS
from sculpt_dist.core.files import file_sha256, read_object, write_atomically

EXPORTS = ".exports.json"  # in the run folder: size and time of the files that `export` wrote there
RECORD = ".model-written"  # in the run folder: the sha256 of the CHECKSUMS of the model that the run wrote
UNPROVEN = ("model.safetensors", "delta.safetensors", "kohya.safetensors", "lora")  # a user may have put them there
CARD = "README.md"  # is written later than the checksums


def record_model(model: Path) -> None:
    """Remember that the run wrote this folder."""
    write_atomically(model.parent / RECORD, file_sha256(model / CHECKSUMS).encode())


def make_room(path: Path) -> None:
    """Remove a file or folder of the run; rename a model folder that the run did not write."""
    if path.name == "model" and path.exists() and not _wrote(path):
        kept = put_aside(path)
        print(f"{path}: was not written by this run, so it is kept as {kept}", flush=True)
    elif path.is_symlink():
        _empty(path)
    elif path.name in UNPROVEN and path.exists():
        print(f"{path}: is kept as {put_aside(path)}", flush=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def foreign_data(data: Path) -> list[Path]:
    """The files in a folder of training data that no run wrote. Data of another run may be copied or linked there."""
    found = (path for path in sorted(data.rglob("*")) if not path.is_dir())
    return [path for path in found if not _is_data(path, path.relative_to(data).as_posix())]


def is_shard(path: Path) -> bool:
    """Whether a run wrote this tar: then a note lies beside it."""
    return path.with_name(f".{path.name}.json").is_file()


def keep_foreign_embeddings(file: Path) -> None:
    """Rename a file that stands where a run's embeddings go, and is none."""
    if file.exists() and not _is_data(file, file.name):
        print(f"{file}: was not written by a run, so it is kept as {put_aside(file)}", flush=True)


def make_room_for_file(run: Path, file: Path) -> None:
    """Rename a file in the run folder that stands where an export goes, unless the run wrote it."""
    if file.is_relative_to(run) and file.exists() and _exports(run).get(file.name) != _stamp(file):
        print(f"{file}: was not written by this run, so it is kept as {put_aside(file)}", flush=True)


def record_file(run: Path, file: Path) -> None:
    """Remember that the run wrote this export."""
    if file.is_relative_to(run):
        content = json.dumps(_exports(run) | {file.name: _stamp(file)})
        write_atomically(run / EXPORTS, content.encode())


def _exports(run: Path) -> dict[str, Any]:
    return read_object(run / EXPORTS, "remove it") if (run / EXPORTS).is_file() else {}


def _stamp(file: Path) -> list[int]:
    about = file.stat()
    return [about.st_size, about.st_mtime_ns]


def _is_data(path: Path, name: str) -> bool:
    if name == "embeddings.safetensors":
        with path.open("rb") as file:
            return b'"key"' in file.read(1_000_000)
    if re.fullmatch(r"[^/]+/[^/]+/\d+\.tar", name):
        return is_shard(path)
    return bool(re.fullmatch(r"[^/]+/[^/]+/(index\.json|\.\d+\.tar\.json)|(.*/)?\..*\.tmp", name))


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


def put_aside(path: Path) -> Path:
    """Rename a file or folder to the first free `NAME.kept-N`."""
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
