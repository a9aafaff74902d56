"""The report of a run: a self-contained page, its numbers as JSON and its figures as PNG, all from the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sculpt_dist.core.files import make_folder, read_object, write_atomically, write_record
from sculpt_dist.report.figures import draw_hurt, draw_loss, draw_mask, draw_pngs, draw_relapse, draw_scores, shorten
from sculpt_dist.report.grid import PAGE_ROWS, Grid, draw_grid, encode, read_grid
from sculpt_dist.report.listed import listed_images
from sculpt_dist.report.page import image_pages, render_concepts, render_images, render_page
from sculpt_dist.report.record import RunRecord, first_concept, plain_scores, read_run, read_scores
from sculpt_dist.report.summary import most_hurt, summarise

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_HURT = 12  # names in the matrix of what lost most


def write_report(folder: Path) -> Path:
    """Write `report/` of a run folder and return the path of its page, the first one of a long run.

    Raises RunFolderError if this is not a run folder or one of its files is damaged.
    """
    run = read_run(Path(folder))
    report = summarise(run)
    grid = _stage_grid(run.folder, run.stages, run.targets, run.last)
    figures = _draw_figures(run, report)
    if grid:
        figures["grid"] = encode(draw_grid(grid), "PNG")
    out = run.folder / "report"
    make_folder(out)
    for name, png in figures.items():
        write_atomically(out / f"{name}.png", png)
    write_record(out / "report.json", report)
    grids = _paged_grids(run, grid)
    pages = {**render_concepts(run, report), **render_images(report, grids)}
    for name, page in {**pages, "report.html": render_page(run, report, figures, grid, image_pages(grids))}.items():
        write_atomically(out / name, page.encode())
    for earlier in (*out.glob("concepts-*.html"), *out.glob("images-*.html")):
        if earlier.name not in pages:
            earlier.unlink()
    return out / "report.html"


def read_report(folder: Path) -> dict[str, Any]:
    """The content of report.json of a run folder. Raises RunFolderError where it is missing or damaged."""
    return read_object(folder / "report" / "report.json", "run `sculpt-dist report` on the run folder")


def draw_stage(folder: Path, stage: str, targets: Sequence[str]) -> Image | None:
    """The sample grid of a run folder, before and at this stage; None if the evaluation kept no images."""
    stages = {name: read_scores(folder, name) for name in ("before", stage)}
    grid = _stage_grid(folder, stages, targets, None if stage == "before" else stage)
    return draw_grid(grid) if grid else None


def _paged_grids(run: RunRecord, shown: Grid | None) -> list[Grid]:
    """All images, page by page; none where the report itself shows every object."""
    if shown is None or shown.num_shown == shown.num_objects:
        return []
    pages = range(-(-shown.num_objects // PAGE_ROWS))
    grids = (_stage_grid(run.folder, run.stages, run.targets, run.last, page) for page in pages)
    return [grid for grid in grids if grid is not None]


def _stage_grid(
    folder: Path,
    stages: Mapping[str, Mapping[str, Any]],
    targets: Sequence[str],
    stage: str | None,
    page: int | None = None,
) -> Grid | None:
    names = [
        name for kind in ("objects", "styles") for scores in stages.values() for name in plain_scores(scores, kind)
    ]
    evaluation = folder / "evaluation"
    sides = [evaluation / name for name in ("before", stage) if name]
    checksums = {
        side / "images" / name: sha256
        for side in sides
        for name, sha256 in listed_images(side, stages[side.name]).items()
    }
    before, *after = (side / "images" for side in sides)
    return read_grid(before, after[0] if after else None, names, targets, checksums, page)


def _draw_figures(run: RunRecord, report: Mapping[str, Any]) -> dict[str, bytes]:
    """PNGs of the figures for which the run has data."""
    num_trained = (run.costs.get("weights") or {}).get("trained")
    first = first_concept(run.config)
    trained = [*run.targets[:-1], f"{first + 1} concepts"] if first else run.targets
    points = [(0, report["before"]), *enumerate(report["concepts"], 1)]
    hurt = most_hurt(run, MOST_HURT)
    lost = zip(*([None if share is None else member.base - share for share in member.after] for member in hurt))
    after = [
        f"after {shorten(target, 16)}" for target, stage in zip(run.targets, list(run.stages.values())[1:]) if stage
    ]
    return draw_pngs(
        {
            "scores": lambda: draw_scores(points),
            "loss": lambda: draw_loss(run.lines, trained),
            "mask": lambda: draw_mask(run.lines, trained, num_trained),
            "relapse": lambda: draw_relapse(run.accuracies, run.targets),
            "hurt": lambda: draw_hurt(after, [member.name for member in hurt], list(lost)),
        }
    )
