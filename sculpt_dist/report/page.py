"""The pages of a report: report.html, pages of images where there are many, and of a long run a page for every 100
concepts. All are self-contained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from sculpt_dist.report.figures import shorten
from sculpt_dist.report.grid import TINY, Grid, encode, read_thumbnail
from sculpt_dist.report.record import CONCEPTS_A_PAGE, RunRecord
from sculpt_dist.report.render import data_uri, render
from sculpt_dist.report.summary import SCORES, most_hurt, seen_counts

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImagePage:
    """One page of images, called after its first and last object."""

    file: str
    title: str


@dataclass(frozen=True)
class ConceptPage:
    """One page of a long run: the concepts `first` to `last`, counted from 1."""

    file: str
    first: int
    last: int
    names: str

    @property
    def title(self) -> str:
        return f"concepts {self.first:,} to {self.last:,}"


def concept_pages(run: RunRecord) -> list[ConceptPage]:
    """The pages of a run's concepts; none if one page holds everything."""
    targets = run.targets if run.is_long else []
    pages: list[ConceptPage] = []
    for start in range(0, len(targets), CONCEPTS_A_PAGE):
        stop = min(start + CONCEPTS_A_PAGE, len(targets))
        names = f"{shorten(targets[start], 30)} to {shorten(targets[stop - 1], 30)}"
        pages.append(ConceptPage(f"concepts-{len(pages) + 1}.html", start + 1, stop, names))
    return pages


def image_pages(grids: Sequence[Grid]) -> list[ImagePage]:
    """The pages of these grids."""
    rows = [[row.name for band in grid.bands for row in band] for grid in grids]
    names = [f"{shorten(of_page[0], 30)} to {shorten(of_page[-1], 30)}" for of_page in rows]
    return [ImagePage(f"images-{number}.html", of_page) for number, of_page in enumerate(names, 1)]


def render_images(report: Mapping[str, Any], grids: Sequence[Grid]) -> dict[str, str]:
    """File name -> page, of all images."""
    pages = image_pages(grids)
    around = zip(grids, pages, [None, *pages], [*pages[1:], None])
    return {
        page.file: render(
            "images.html", _filters(grid), report=report, grid=grid, page=page, before=before, after=after
        )
        for grid, page, before, after in around
    }


def _filters(grid: Grid | None) -> dict[str, Callable[[Image], str]]:
    is_tiny = grid is not None and grid.is_tiny
    return {"thumbnail": lambda image: _thumbnail_uri(image, is_tiny)}


def render_page(
    run: RunRecord,
    report: Mapping[str, Any],
    figures: Mapping[str, bytes],
    grid: Grid | None,
    images: Sequence[ImagePage] = (),
) -> str:
    """The page with all images inlined and all text of the user escaped. `figures`: PNGs by name.

    Of a long run, it leaves out what `render_concepts` lists. `images`: the pages of all images.
    """
    from yaml import safe_dump

    num_scored = list(run.stages).index(run.last) if run.last else 0
    scored = [
        (number, record)
        for number, record in enumerate(report["concepts"][:num_scored], 1)
        if number == num_scored or any(record[name] is not None for name in SCORES)
    ]
    config = {key: section for key, section in run.config.items() if not (run.is_long and key == "concepts")}
    paged = _paged_groups(run)
    return render(
        "page.html",
        _filters(grid),
        report=report,
        config=safe_dump(config, sort_keys=False, allow_unicode=True),
        scores=SCORES,
        steps=[concept["target"] for concept in report["concepts"]],
        num_scored=num_scored,
        scored=scored[-1:] if run.is_long else scored,
        accuracies=run.accuracies,
        losses=[(hurt.name, hurt.base, hurt.end) for hurt in most_hurt(run, 3)],
        counts=seen_counts(report),
        manifest={name: member for name, member in run.manifest.items() if name not in paged},
        figures=figures,
        grid=grid,
        attack_images=_attack_images(run, report),
        pages=concept_pages(run),
        image_pages=images,
        paged=list(paged),
    )


def _attack_images(run: RunRecord, report: Mapping[str, Any]) -> dict[str, list[tuple[str, Image | None, bool]]]:
    """Of every attack, the images to show: (concept, image, whether the concept is seen in it)."""
    return {
        name: [
            (shown["concept"], read_thumbnail(run.folder / "attacks" / shown["file"]), bool(shown["seen"]))
            for shown in rates.get("shown") or ()
        ]
        for name, rates in (report["attacks"].get("attacks") or {}).items()
    }


def render_concepts(run: RunRecord, report: Mapping[str, Any]) -> dict[str, str]:
    """File name -> page, of the concepts of a long run; no pages for a short one."""
    pages, paged = concept_pages(run), _paged_groups(run)
    last = list(run.stages).index(run.last) if run.last else 0
    losses = {line["concept"]: line.get("loss") for line in run.lines}
    seen = {name: (then, now) for name, now, _, then in seen_counts(report)}
    found = {}
    for at, page in enumerate(pages):
        rows = []
        for number in range(page.first, page.last + 1):
            record, loss = report["concepts"][number - 1], losses.get(number - 1)
            base, own, end = (run.accuracies[stage][number - 1] for stage in (0, number, last))
            rows.append(
                {
                    "number": number,
                    "record": record,
                    "accuracies": (base, own, end if last >= number else None),
                    "relapse": None if own is None or end is None or last < number else end - own,
                    "seen": seen.get(record["target"], (None, None)),
                    "loss": loss if loss is not None and math.isfinite(loss) else None,
                }
            )
        slices = {
            name: dict(islice(members.items(), *(len(members) * edge // len(pages) for edge in (at, at + 1))))
            for name, members in paged.items()
        }
        found[page.file] = render(
            "concepts.html",
            report=report,
            page=page,
            before=pages[at - 1] if at else None,
            after=pages[at + 1] if at + 1 < len(pages) else None,
            rows=rows,
            scores=SCORES,
            has_scores=run.last is not None,
            has_accuracy=any(share is not None for row in rows for share in row["accuracies"]),
            has_seen=bool(seen),
            has_loss=bool(losses),
            paged=slices,
        )
    return found


def _paged_groups(run: RunRecord) -> dict[str, Mapping[str, Any]]:
    """The parts of a long run's manifest with more members than a page should list, such as its shards."""
    groups = {name: members for name, members in run.manifest.items() if isinstance(members, dict)}
    return {name: members for name, members in groups.items() if run.is_long and len(members) > CONCEPTS_A_PAGE}


def _thumbnail_uri(image: Image, is_tiny: bool) -> str:
    if is_tiny:  # enlarged without smoothing, as the page does itself
        return data_uri(encode(image.resize((TINY, TINY), 0), "png"), "png")
    return data_uri(encode(image, "jpeg"), "jpeg")  # a photograph is ten times larger as PNG
