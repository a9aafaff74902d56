"""The page of a report: report.html, self-contained, from the template page.html."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sculpt_dist.report.grid import Grid, encode
from sculpt_dist.report.record import RunRecord
from sculpt_dist.report.summary import SCORES, largest_losses, seen_counts

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATES = Path(__file__).parent / "templates"


def render_page(run: RunRecord, report: Mapping[str, Any], figures: Mapping[str, bytes], grid: Grid | None) -> str:
    """The page with all images inlined and all text of the user escaped. `figures`: PNGs by name."""
    import jinja2
    from omegaconf import OmegaConf

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    is_tiny = grid is not None and grid.is_tiny
    environment.filters["data_uri"] = lambda png: _data_uri(png, "png")
    environment.filters["thumbnail"] = lambda image: _thumbnail_uri(image, is_tiny)
    return environment.get_template("page.html").render(
        report=report,
        config=OmegaConf.to_yaml(OmegaConf.create(run.config)),
        scores=SCORES,
        steps=[concept["target"] for concept in report["concepts"]],
        num_scored=list(run.stages).index(run.last) if run.last else 0,
        accuracies=run.accuracies,
        losses=largest_losses(run),
        counts=seen_counts(report),
        num_unreadable=run.num_unreadable,
        manifest=run.manifest,
        figures=figures,
        grid=grid,
    )


def _thumbnail_uri(image: Image, is_tiny: bool) -> str:
    kind = "png" if is_tiny else "jpeg"  # a photograph is ten times larger as PNG
    return _data_uri(encode(image, kind), kind)


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
