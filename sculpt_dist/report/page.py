"""The page of a report: report.html, self-contained, from the template page.html."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sculpt_dist.report.grid import Grid, encode
from sculpt_dist.report.record import RunRecord
from sculpt_dist.report.render import data_uri, render
from sculpt_dist.report.summary import SCORES, largest_losses, seen_counts

if TYPE_CHECKING:
    from PIL.Image import Image


def render_page(run: RunRecord, report: Mapping[str, Any], figures: Mapping[str, bytes], grid: Grid | None) -> str:
    """The page with all images inlined and all text of the user escaped. `figures`: PNGs by name."""
    from yaml import safe_dump

    is_tiny = grid is not None and grid.is_tiny
    return render(
        "page.html",
        {"thumbnail": lambda image: _thumbnail_uri(image, is_tiny)},
        report=report,
        config=safe_dump(run.config, sort_keys=False, allow_unicode=True),
        scores=SCORES,
        steps=[concept["target"] for concept in report["concepts"]],
        num_scored=list(run.stages).index(run.last) if run.last else 0,
        accuracies=run.accuracies,
        losses=largest_losses(run),
        counts=seen_counts(report),
        manifest=run.manifest,
        figures=figures,
        grid=grid,
    )


def _thumbnail_uri(image: Image, is_tiny: bool) -> str:
    kind = "png" if is_tiny else "jpeg"  # a photograph is ten times larger as PNG
    return data_uri(encode(image, kind), kind)
