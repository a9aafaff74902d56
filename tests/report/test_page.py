"""The HTML page of a report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from comparison_page import write_comparison
from handmade_run import Page, edit_config, edit_json, write_attacks, write_run

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
        "Hurt most",
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
    assert len(sources) == 12 * 5 * 2 + 5  # thumbnails and five charts
    assert all(re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", source) for source in sources)
    text = (finished / "report" / "report.html").read_text()
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text


HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)> onload=1 {{ 7*7 }} ${oc.env:HOME} & </style>"


def shape(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """The tags of a page with the names of their attributes."""
    return [(tag, tuple(attributes)) for tag, attributes in Page(path).tags]


def renamed(folder: Path, name: str) -> Path:
    """The report of a run in which everything that can be named has this name: concepts, keys, values, files."""
    write_run(folder, targets=(name, "car"), styles=("natural", "neon"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["concepts"][0]["superclass"] = name
    edit_config(folder, concepts=config["concepts"], method={"name": name, name: name}, model={"path": f"/a/{name}"})
    edit_json(folder / "manifest.json", base=name, **{name: name, "shards": {name: name}})
    for stage in ("before", "after-00", "after-01"):
        place = folder / "evaluation" / stage
        part = json.loads((place / "scores.json").read_text())["plain"]
        part |= {"extra": {name: 1.0}, "objects": {**part["objects"], name: 0.5}, "styles": {name: 0.9}}
        part["targets"][name]["seen"] = part["targets"][name]["images"] = 3
        edit_json(place / "scores.json", plain=part)
        (place / "images" / "cat--natural.png").rename(place / "images" / f"x{name.replace('/', '_')}--natural.png")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"terms": {name: line["loss"]}, "target": name}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write_report(folder)


def test_no_tag_or_attribute_of_a_report_is_made_from_names_keys_or_values(tmp_path: Path) -> None:
    plain, hostile = renamed(tmp_path / "plain", "dog"), renamed(tmp_path / "hostile", HOSTILE)
    assert shape(hostile) == shape(plain) and len(shape(plain)) > 100
    page = Page(hostile)
    assert page.count("script") == 0 and page.words.count("<script>alert(1)</script>") > 10
    assert not [name for _, names in shape(hostile) for name in names if name.startswith("on")]
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name == "href"]
    assert links == ["images-1.html"], "the page of its thirteen objects"
    images = Page(hostile.with_name("images-1.html"))
    assert images.count("script") == 0 and "<script>alert(1)</script>" in images.words


def test_no_tag_or_attribute_of_a_comparison_is_made_from_names(tmp_path: Path) -> None:
    plain, hostile = write_comparison(tmp_path / "plain", "dog"), write_comparison(tmp_path / "hostile", HOSTILE)
    assert shape(hostile) == shape(plain)
    assert Page(hostile).count("script") == 0 and "<script>alert(1)</script>" in Page(hostile).words


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_tables_can_be_read_and_scrolled_without_eyes_or_mouse(finished: Path, tmp_path: Path, name: str) -> None:
    image = finished / "evaluation" / "before" / "images" / "cat--neon.png"
    place = finished / "report" / "report.html"
    page = Page(place if name == "report" else write_comparison(tmp_path / "run", images=(image,)))
    tags = page.tags
    regions = [attributes for tag, attributes in tags if "scroll" in (attributes.get("class") or "").split()]
    assert regions and all(
        region["tabindex"] == "0" and region["role"] == "region" and region["aria-label"] for region in regions
    )
    assert page.count("caption") == page.count("table") > 0
    heads = [attributes.get("scope") for tag, attributes in tags if tag == "th"]
    assert len(heads) > 10 and set(heads) <= {"row", "col", "colgroup"}
    alts = [attributes["alt"] for tag, attributes in tags if tag == "img"]
    assert len(set(alts)) == len(alts) > 0 and all(alts)
    policy = dict(tags[tags.index(("meta", {"charset": "utf-8"})) + 1][1])
    assert policy["http-equiv"] == "Content-Security-Policy" and (policy["content"] or "").startswith(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline';"
    )


def test_concept_names_are_text_and_never_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", targets=('<script>alert("1")</script> & $co$', "car"))
    page = Page(write_report(folder))
    assert page.count("script") == 0
    assert '<script>alert("1")</script> & $co$ and car unlearned' in page.words


def test_the_page_tells_what_attacks_found_of_the_runs_own_model(tmp_path: Path) -> None:
    folder = write_attacks(write_run(tmp_path / "run"))
    page = Page(write_report(folder))
    assert "does the concept come back?" in page.text and "leak: 0.01" in page.text and "1 steps: 0.5" in page.text
    (image,) = [attributes for tag, attributes in page.tags if tag == "img" and "noise" in str(attributes.get("alt"))]
    assert image["alt"] == "cat, noise, seen" and image["class"] == "seen"
    file = folder / "attacks" / "attacks.json"
    file.write_text(file.read_text().replace('"checksums": null', f'"checksums": "{"0" * 64}"'))
    (folder / "model").mkdir()
    (folder / "model" / "CHECKSUMS").write_text("of the run")
    page = Page(write_report(folder))
    assert "does the concept come back?" not in page.text and "made on another model" in page.text
