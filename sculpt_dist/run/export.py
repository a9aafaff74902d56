"""The result as a normal diffusers folder with a model card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.io.writing import write_pipeline
from sculpt_dist.core.errors import NonFiniteError, RunFolderError
from sculpt_dist.core.files import free_space
from sculpt_dist.engine.group import Group
from sculpt_dist.run.owned import make_room, record_model


def export_model(
    dtype: str, backbone: Backbone, weights: Iterable[tuple[str, Tensor | None]], folder: Path, group: Group
) -> Path:
    """Write `folder` aside and rename it into place; all ranks enter, the first writes, one tensor in memory at a time.

    `weights` are the changed parameters, whole on the first rank; the rest is streamed from the base. An adapter is
    merged. Everything is written in `dtype`, such as float32. Raises, on all ranks, NonFiniteError for a weight that is
    not finite in that type, and RunFolderError when the disk refuses.
    """
    weights = iter(weights)

    def work() -> None:
        try:
            if group.is_first:
                _write(getattr(torch, dtype), backbone, weights, folder)
        finally:
            for _ in weights:  # each is summed over all ranks, which would wait for a rank that stops early
                pass

    group.together(work)
    return folder


def _write(dtype: torch.dtype, backbone: Backbone, weights: Iterator[tuple[str, Tensor | None]], folder: Path) -> None:
    place = folder.resolve()  # a link leads to another disk, as a rule
    aside = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    for debris in place.parent.glob(f".{place.name}.*.tmp"):
        shutil.rmtree(debris)
    written: set[str] = set()

    def changed() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in backbone.merged(weights):
            if not bool(torch.isfinite(tensor.to(dtype)).all()):
                raise NonFiniteError(
                    f"{name}: a weight is not finite in {dtype}, so nothing is exported; lower train.lr, or choose a "
                    "model.dtype with a wider range"
                )
            written.add(name)
            yield name, tensor

    def unchanged() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in backbone.stored_weights():
            if name not in written:
                yield name, tensor

    try:
        write_pipeline(backbone.folder, aside, backbone.net_name, dtype, chain(changed(), unchanged()))
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunFolderError(f"{folder}: cannot be written: {error} ({free_space(place.parent)})") from error
        raise
    if folder.exists():
        make_room(folder)
    if place.is_dir():  # emptied, behind a link
        place.rmdir()
    os.rename(aside, place)
    record_model(folder)


def write_card(run: Path) -> None:
    """README.md of the exported folder, from the run's configuration and report."""
    from omegaconf import OmegaConf

    from sculpt_dist.core.files import write_atomically
    from sculpt_dist.report.card import model_card
    from sculpt_dist.report.report import read_report

    config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(run / "config.yaml")))
    report = read_report(run)
    write_atomically(run / "model" / "README.md", model_card(config, report).encode())
