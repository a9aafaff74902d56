"""The report of a long run: a first page with the summary, and a page for every 100 concepts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from handmade_run import Page, edit_config, edit_json, read_report, score_set, write_run
from test_page import HOSTILE, shape

from sculpt_dist.report.card import model_card
from sculpt_dist.report.record import read_run
from sculpt_dist.report.report import write_report

NUM_CONCEPTS = 250
SCORED = (0, 99, 100, 249)  # after these concepts, and before


def write_long_run(folder: Path, num_concepts: int = NUM_CONCEPTS, name: str = "thing") -> Path:
    """A finished run whose scores give every target the accuracy 0.5 before it is unlearned, and 0.1 after."""
    write_run(folder, styles=("neon",))
    names = [f"{name} {number}" for number in range(num_concepts)]
    edit_config(folder, concepts=[{"target": target, "superclass": "animal", "kind": "object"} for target in names])
    for stage in ("after-00", "after-01"):
        (folder / "evaluation" / stage / "scores.json").unlink()
    for number in (-1, *(number for number in SCORED if number < num_concepts)):
        stage = folder / "evaluation" / ("before" if number < 0 else f"after-{number:02d}")
        stage.mkdir(exist_ok=True)
        targets = {
            target: {"accuracy": 0.1 if at <= number else 0.5, "seen": 1, "images": 10}
            for at, target in enumerate(names)
        }
        plain = score_set(0 if number < 0 else 2) | {"targets": targets}
        (stage / "scores.json").write_text(json.dumps({"plain": plain, "paraphrased": None}))
    lines = [
        {"concept": concept, "target": target, "step": step, "steps": 2, "phase": "train", "loss": 1 + concept / 1000}
        for concept, target in enumerate(names)
        for step in range(2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shards = {f"data/object-{number}/{source}": "d" * 64 for number in range(num_concepts) for source in "ts"}
    edit_json(folder / "manifest.json", shards=shards)
    return folder


@pytest.fixture(scope="module")
def long_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_long_run(tmp_path_factory.mktemp("long") / "run")).parent


def links(page: Path) -> list[str]:
    return [attributes["href"] or "" for tag, attributes in Page(page).tags if tag == "a"]


def test_every_page_is_reached_by_links_from_the_first_one(long_report: Path) -> None:
    assert links(long_report / "report.html") == ["concepts-1.html", "concepts-2.html", "concepts-3.html"]
    assert links(long_report / "concepts-2.html") == 2 * ["report.html", "concepts-1.html", "concepts-3.html"]
    assert links(long_report / "concepts-3.html") == 2 * ["report.html", "concepts-2.html"]
    assert sorted(page.name for page in long_report.glob("*.html"))[:3] == links(long_report / "report.html")


def test_each_concept_and_each_shard_is_on_one_page(long_report: Path) -> None:
    words = {page.stem: Page(page).words for page in long_report.glob("*.html")}
    for number in (0, 99, 100, 249):
        places = [name for name, text in words.items() if f" {number + 1} thing {number} animal " in text]
        assert places == [f"concepts-{number // 100 + 1}"]
    shards = {name: re.findall(r"data/object-\d+/[ts]", text) for name, text in words.items()}
    assert sorted(map(len, shards.values())) == [0, 166, 167, 167]
    assert len({shard for of_page in shards.values() for shard in of_page}) == 2 * NUM_CONCEPTS
    assert "thing 150" not in words["report"]


def test_the_rows_hold_scores_accuracies_and_the_last_loss(long_report: Path) -> None:
    words = Page(long_report / "concepts-1.html").words
    assert "100 thing 99 animal 97.1 95.1 to 99.1" in words
    assert "50.0 10.0 10.0 +0.0 1 1 1.099" in words, "base, once unlearned, end, relapse, seen before and then, loss"
    assert "2 thing 1 animal - - - - 50.0 - 10.0 - 1 1 1.001" in words, "not scored after this one"


def test_pages_are_bounded_and_keep_the_rules_of_the_report(long_report: Path, tmp_path: Path) -> None:
    for page in long_report.glob("concepts-*.html"):
        found = Page(page)
        assert page.stat().st_size < 100_000
        assert (
            found.count("caption") == found.count("table") == 1
            and not {"script", "img", "link"} & dict(found.tags).keys()
        )
        policy = dict(found.tags[found.tags.index(("meta", {"charset": "utf-8"})) + 1][1])
        assert (policy["content"] or "").startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline';")
        assert all(attributes.get("aria-label") for tag, attributes in found.tags if tag == "nav")
    text = re.sub('data:image/[^"]*', "", (long_report / "report.html").read_text())
    longer = write_report(write_long_run(tmp_path / "run", 1000))
    more = re.sub('data:image/[^"]*', "", longer.read_text())
    assert len(more) - len(text) < 7 * 300, "a link for each further page"
    assert all(page.stat().st_size < 100_000 for page in longer.parent.glob("concepts-*.html"))


def test_report_json_has_accuracies_of_scored_stages_only(long_report: Path) -> None:
    relapse = read_report(long_report.parent)["relapse"]
    assert [number for number, row in enumerate(relapse) if row is not None] == list(SCORED)
    assert relapse[99][98:102] == [0.1, 0.1, 0.5, 0.5] and len(relapse) == NUM_CONCEPTS


def test_a_hundred_concepts_are_one_page_and_leave_none_of_an_earlier_report(tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run", 101)
    assert len(list(write_report(folder).parent.glob("*.html"))) == 3
    concepts = [{"target": f"thing {number}", "superclass": "animal"} for number in range(100)]
    edit_config(folder, concepts=concepts)
    page = write_report(folder)
    assert [file.name for file in page.parent.glob("*.html")] == ["report.html"] and not links(page)
    assert "thing 57 → animal" in Page(page).words


def test_no_tag_or_attribute_of_the_pages_is_made_from_names(tmp_path: Path) -> None:
    plain = write_report(write_long_run(tmp_path / "plain", 120)).parent
    hostile = write_report(
        write_long_run(tmp_path / "hostile", 120, HOSTILE.replace("{", "(").replace("}", ")") + " {}")
    )
    for page in plain.glob("*.html"):
        assert shape(hostile.parent / page.name) == shape(page), page.name


def test_the_card_of_a_long_run_names_a_few_concepts_and_lists_them_all(tmp_path: Path) -> None:
    card = model_card(read_run(write_long_run(tmp_path / "run")).config, {})
    title = "models/canvas-sd15 without thing 0, thing 1, thing 2, thing 3, thing 4, thing 5 and 244 more"
    assert f"# {title}\n" in card and yaml.safe_load(card.split("---\n", 2)[1])["model_name"] == title
    assert "| thing 249 | object | animal |" in card
