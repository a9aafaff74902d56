"""Compares all in a run folder, a model folder, a delta or an audit bundle with the checksums written with it.

Nothing is changed. Files without a checksum of ours, such as those of earlier versions, are counted apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sculpt_dist.backbones.formats.delta_file import is_delta_intact
from sculpt_dist.backbones.io.folders import CHECKSUMS, hub_checksum, listed_checksums
from sculpt_dist.backbones.io.tensorfile import entries
from sculpt_dist.backbones.parts.embeddings import is_embeddings_intact
from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.core.files import file_sha256, is_intact, is_text_intact
from sculpt_dist.data.shards import damage, read_index
from sculpt_dist.engine.checkpoints.restore import verify, written
from sculpt_dist.report.listed import listed_images
from sculpt_dist.report.record import first_concept, read_run
from sculpt_dist.report.steps import read_metrics
from sculpt_dist.run.audit_files import bundle_findings, is_bundle
from sculpt_dist.run.owned import RECORD

Finding = tuple[Path, str | None]  # a file, and what is wrong with it; NO_CHECKSUM where that cannot be known
NO_CHECKSUM = "has no checksum"


@dataclass(frozen=True)
class Verified:
    """How many files are as they were written, and those that have no checksum."""

    num_files: int
    without: tuple[Path, ...]


def verify_place(place: Path) -> Verified:
    """Compare a run folder, a model folder or a delta with its checksums.

    Raises RunFolderError for the first file that differs, and where nothing has a checksum.
    """
    num_files, without = 0, []
    for file, fault in _findings(place):
        if fault == NO_CHECKSUM:
            without.append(file)
        elif fault is not None:
            raise RunFolderError(f"{file}: {fault} ({num_files:,} files before it are as they were written)")
        else:
            num_files += 1
    if not num_files:
        raise RunFolderError(f"{place}: holds no checksums of sculpt-dist, so nothing can be compared")
    return Verified(num_files, tuple(without))


def _findings(place: Path) -> Iterator[Finding]:
    if is_bundle(place):
        return bundle_findings(place)
    if place.is_file():
        return _tensors(place)
    if (place / "model_index.json").is_file():
        return _model(place)
    if (place / "config.yaml").is_file():
        return _run(place)
    raise RunFolderError(f"{place}: is no run folder, model folder, delta file or audit bundle")


def _run(folder: Path) -> Iterator[Finding]:
    text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    yield folder / "config.yaml", _judged(is_text_intact(text))
    for name in ("manifest.json", "costs.json"):
        yield from _record(folder / name)
    for stage in sorted(path for path in folder.glob("evaluation/*") if (path / "scores.json").exists()):
        yield from _stage(stage)
    yield from _attacks(folder / "attacks")
    run = read_run(folder, with_steps=False)
    num_finished = len(run.targets) if run.manifest.get("finished") else 0
    yield from _metrics(folder / "metrics.jsonl", num_finished, first_concept(run.config))
    for index in sorted(folder.glob("data/*/*/index.json")):
        yield from _shards(index, (run.manifest.get("shards") or {}).get(index.parent.relative_to(folder).as_posix()))
    embeddings = folder / "data" / "embeddings.safetensors"
    if embeddings.exists():
        yield embeddings, _judged(is_embeddings_intact(embeddings))
    for checkpoint in written(folder / "checkpoints"):
        fault = verify(checkpoint)[1]
        yield from ((file, fault) for file in sorted(checkpoint.iterdir()))
    if (folder / "model" / "model_index.json").is_file():
        yield from _model(folder / "model")
    if (folder / RECORD).is_file() and (folder / "model").is_dir():
        yield _compared(folder / "model" / CHECKSUMS, (folder / RECORD).read_text())
    yield from _record(folder / "report" / "report.json")
    for file in sorted(folder.glob("*.safetensors")):
        yield from _tensors(file)


def _record(file: Path) -> Iterator[Finding]:
    if not file.exists():
        return
    try:
        content: Any = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        content = None
    yield file, _judged(is_intact(content)) if isinstance(content, dict) else "cannot be read"


def _metrics(file: Path, num_finished: int, first: int) -> Iterator[Finding]:
    if not file.exists():
        return
    steps = read_metrics(file)
    faults = {
        "cannot be read": steps.num_unreadable,
        "differ from their checksums": steps.num_changed,
        "are missing": steps.num_missing(num_finished, first),
    }
    found = [f"{number:,} of its lines {fault}" for fault, number in faults.items() if number]
    yield file, found[0] if found else NO_CHECKSUM if steps.num_unsealed else None


def _stage(stage: Path) -> Iterator[Finding]:
    yield from _record(stage / "scores.json")
    yield from _record(stage / "answers.json")
    images = listed_images(stage, json.loads((stage / "scores.json").read_bytes()))
    if (stage / "images.csv").exists():
        yield stage / "images.csv", None
    for name, sha256 in images.items():
        yield _compared(stage / "images" / name, sha256)


def _attacks(folder: Path) -> Iterator[Finding]:
    yield from _record(folder / "attacks.json")
    for piece in sorted(folder.glob("*/*.json")):
        found = list(_record(piece))
        yield from found
        if found[0][1] is None:
            files = json.loads(piece.read_bytes()).get("files") or {}
            yield from (_compared(piece.parent / Path(name).name, sha256) for name, sha256 in files.items())


def _shards(index: Path, sha256: str | None) -> Iterator[Finding]:
    yield _compared(index, sha256) if sha256 else (index, NO_CHECKSUM)
    for record in read_index(index.parent)[1]:
        fault = damage(index.parent, record)
        yield index.parent / record.name, None if fault is None else "differs from its index"


def _model(folder: Path) -> Iterator[Finding]:
    known = listed_checksums(folder)
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    for file in sorted({*known, *files}):
        sha256 = known.get(file) or hub_checksum(file)
        yield _compared(file, sha256) if sha256 else (file, NO_CHECKSUM)


def _tensors(file: Path) -> Iterator[Finding]:
    entries(file)  # raises ModelError for a file that is cut short
    yield file, _judged(is_delta_intact(file))


def _compared(file: Path, sha256: str) -> Finding:
    if not file.is_file():
        return file, "is missing"
    return file, _judged(file_sha256(file) == sha256)


def _judged(intact: bool | None) -> str | None:
    return NO_CHECKSUM if intact is None else None if intact else "differs from its checksum"
