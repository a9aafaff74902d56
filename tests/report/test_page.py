"""The HTML page of a report."""

from __future__ import annotations

import re
from pathlib import Path

from handmade_run import Page, write_run

from sculpt_dist.report.report import write_report


def test_the_page_shows_headline_scores_grid_relapse_curves_cost_and_config_in_this_order(finished: Path) -> None:
    words = Page(finished / "report" / "report.html").words
    order = (
        "sculpt-dist report cat and car unlearned from models/canvas-sd15 with dm_cal",
        "97.1 % of the target images are no longer recognised as their target (before: 1.9 %).",
        "Scores",
        "plain prompts",
        "base 1.9 0.0 to 3.9",
        "after cat 49.7 47.7 to 51.7",
        "after car 97.1 95.1 to 99.1",
        "bootstrap over prompts; 210 images with a target and 630 without",
        "Largest losses among the concepts to keep: fish (99.0",
        "Before and after",
        "Relapse",
        "cat 98.0 0.0 3.1 +3.1",
        "Loss by term",
        "Mask",
        "Cost",
        "rank 1: 1.1 GiB",
        "Provenance",
        "cccccccccccc..",
        "label_guidance: 1.0",
    )
    places = [words.find(part) for part in order]
    assert -1 not in places, order[places.index(-1)]
    assert places == sorted(places)


def test_the_page_loads_nothing_from_outside(finished: Path) -> None:
    page = Page(finished / "report" / "report.html")
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    sources = [
        value
        for _, attrs in page.tags
        for name, value in attrs.items()
        if name in ("src", "href", "srcset", "data", "action")
    ]
    assert len(sources) == 12 * 5 * 2 + 3  # thumbnails and three charts
    assert all(re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", source) for source in sources)
    text = (finished / "report" / "report.html").read_text()
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text


def test_concept_names_are_text_and_never_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", targets=('<script>alert("1")</script> & $co$', "car"))
    page = Page(write_report(folder))
    assert page.count("script") == 0
    assert '<script>alert("1")</script> & $co$ and car unlearned' in page.words
