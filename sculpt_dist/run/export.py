"""The result as a normal diffusers folder with a model card."""

from __future__ import annotations

import json
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
from sculpt_dist.engine.group import Group
from sculpt_dist.run.owned import make_room, record_model


def export_model(
    dtype: str, backbone: Backbone, weights: Iterable[tuple[str, Tensor | None]], folder: Path, group: Group
) -> Path:
    """Write `folder` aside and rename it into place; all ranks enter, the first writes, one tensor in memory at a time.

    `weights` are the changed parameters, whole on the first rank; the rest is streamed from the base. An adapter is
    merged. Everything is written in `dtype`, such as float32.
    """
    if not group.is_first:
        for _ in weights:
            pass
        group.barrier()
        return folder
    place = folder.resolve()  # a link leads to another disk, as a rule
    aside = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    for debris in place.parent.glob(f".{place.name}.*.tmp"):
        shutil.rmtree(debris)
    written: set[str] = set()

    def changed() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in backbone.merged(weights):
            written.add(name)
            yield name, tensor

    def unchanged() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in backbone.stored_weights():
            if name not in written:
                yield name, tensor

    write_pipeline(backbone.folder, aside, backbone.net_name, getattr(torch, dtype), chain(changed(), unchanged()))
    if folder.exists():
        make_room(folder)
    if place.is_dir():  # emptied, behind a link
        place.rmdir()
    os.rename(aside, place)
    record_model(folder)
    group.barrier()
    return folder


def write_card(run: Path) -> None:
    """README.md of the exported folder, from the run's configuration and report."""
    from omegaconf import OmegaConf

    from sculpt_dist.core.files import write_atomically
    from sculpt_dist.report.card import model_card

    config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(run / "config.yaml")))
    report = json.loads((run / "report" / "report.json").read_text())
    write_atomically(run / "model" / "README.md", model_card(config, report).encode())
