"""The result as a normal diffusers folder with a model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.io.writing import write_pipeline
from sculpt_dist.config.load import read_run_config
from sculpt_dist.core.errors import NonFiniteError
from sculpt_dist.core.files import write_atomically, written_aside
from sculpt_dist.engine.group import Group
from sculpt_dist.run.owned import make_room, record_model


def export_model(
    dtype: str,
    backbone: Backbone,
    weights: Iterable[tuple[str, Tensor | None]],
    folder: Path,
    group: Group,
    beside: Path | None = None,
) -> Path:
    """Write `folder` aside and rename it into place; all ranks enter, the first writes, one tensor in memory at a time.

    `weights` are the changed parameters, whole on the first rank, in the order of `Backbone.in_stored_order`; the rest
    is streamed from the base. An adapter is merged. Everything is written in `dtype`, such as float32, or ("source") as
    the base stores it. `beside`: a folder that is copied into the model's.

    Raises, on all ranks, NonFiniteError for a weight that is not finite in that type, and WriteError when the disk
    refuses.
    """
    weights = iter(weights)

    def work() -> None:
        try:
            if group.is_first:
                _write(None if dtype == "source" else getattr(torch, dtype), backbone, weights, folder, beside)
        finally:
            for _ in weights:  # each is summed over all ranks, which would wait for a rank that stops early
                pass

    group.together(work)
    return folder


def _write(
    dtype: torch.dtype | None,
    backbone: Backbone,
    weights: Iterator[tuple[str, Tensor | None]],
    folder: Path,
    beside: Path | None,
) -> None:
    place = folder.resolve()  # a link leads to another disk, as a rule
    for debris in place.parent.glob(f".{place.name}.*.tmp"):
        shutil.rmtree(debris, ignore_errors=True)
    dtypes = {entry.name: dtype or entry.dtype for entry in backbone.stored_entries()}

    def changed() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in backbone.merged(weights):
            if not bool(torch.isfinite(tensor.to(dtypes[name])).all()):
                raise NonFiniteError(
                    f"{name}: a weight is not finite in {dtypes[name]}, so nothing is exported; lower train.lr, or "
                    "choose a model.export_dtype with a wider range"
                )
            yield name, tensor

    with written_aside(place) as aside:
        whole = _replaced(backbone.stored_weights(), changed())
        write_pipeline(backbone.folder, aside, backbone.net_name, dtype, whole, beside)
        if folder.exists():
            make_room(folder)
    record_model(folder)


def _replaced(
    stored: Iterable[tuple[str, Tensor]], changed: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors with the changed ones in their places; both come in the same order."""
    name, tensor = next(changed, ("", None))
    for stored_name, before in stored:
        if stored_name == name and tensor is not None:
            yield name, tensor
            name, tensor = next(changed, ("", None))
        else:
            yield stored_name, before
    if tensor is not None:
        raise ValueError(f"{name}: is not stored, or does not come in the order of the stored weights")


def write_report_and_card(run: Path, backbone: Backbone) -> None:
    """Tell of a run in its report and in the README.md of its model."""
    from sculpt_dist.report.report import write_report

    write_report(run)
    write_card(run, backbone)


def write_card(run: Path, backbone: Backbone, into: Path | None = None, adapter: str | None = None) -> None:
    """README.md of the exported folder, or of the folder `into` of an `adapter`, from the run's settings and report.

    A run that is not finished has no report yet.
    """
    from sculpt_dist.report.card import licence_of, model_card
    from sculpt_dist.report.report import read_report

    config = read_run_config(run / "config.yaml")
    report = read_report(run) if (run / "report" / "report.json").is_file() else {}
    card = model_card(config, report, backbone.pipeline_options(), licence_of(backbone.folder), adapter)
    write_atomically((into or run / "model") / "README.md", card.encode())
