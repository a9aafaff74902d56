"""The report and the model card of a handmade run folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.report.card import model_card
from sculpt_dist.report.figures import draw_loss, draw_mask
from sculpt_dist.report.grid import read_grid
from sculpt_dist.report.record import read_metrics
from sculpt_dist.report.report import write_report

OBJECTS = ("cat", "fish", "bird", "flower", "tree", "cactus", "house", "tower", "bridge", "car", "boat", "rocket")
STYLES = ("natural", "sketch", "neon", "popart", "mosaic")
SCORES = {
    "UA": (0.019, 0.497, 0.971),
    "SA": (0.012, 0.46, 0.93),
    "IRA": (0.984, 0.979, 0.963),
    "CRA": (0.998, 0.996, 0.976),
}
ACCURACY = {"cat": (0.98, 0.0, 0.031), "car": (0.982, 0.965, 0.027)}  # base, after cat, after car


def score_set(stage: int, targets: Sequence[str] = ("cat", "car"), worse: float = 0.0) -> dict[str, Any]:
    """Scores of a stage: 0 is the base, k comes after the k-th concept."""
    members: dict[str, Any] = {}
    for name, values in SCORES.items():
        value = round(max(values[stage] - worse, 0.0), 4)
        members |= {name: value, f"{name}_ci95": [round(max(value - 0.02, 0), 4), round(min(value + 0.02, 1), 4)]}
    recognised = {name: ACCURACY[old][stage] for name, old in zip(targets, ACCURACY)}
    members["images"] = {"target": 210, "other": 630}
    members["targets"] = {name: {"accuracy": share, "UA": 1 - share, "SA": 0.9} for name, share in recognised.items()}
    members["objects"] = {name: recognised.get(name, 0.99 - 0.04 * stage * (name == "fish")) for name in OBJECTS}
    members["styles"] = dict.fromkeys(STYLES, 0.99)
    members["extra"] = {"clip_score": 27.4 - 0.3 * stage, "fid": 12.5 + stage}
    return members


def metric_lines() -> list[dict[str, Any]]:
    """Two concepts with 10 collect steps and 60 updates each; the mask is refreshed every 10 updates."""
    rng = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for concept, target in enumerate(("cat", "car")):
        for step in range(70):
            line = {"concept": concept, "target": target, "step": step, "lr": 1e-3, "grad_norm": 0.4, "seconds": 0.05}
            noise = float(np.exp(0.25 * rng.standard_normal()))
            if step < 10:
                lines.append({**line, "phase": "collect", "loss": 0.3 * noise})
                continue
            terms = {
                "forget": 0.02 + 0.4 * np.exp(-step / 12) * noise,
                "retain": 0.05 * noise,
                "distill": 0.006 * noise * (1 + step / 70),
            }
            line |= {"phase": "train", "loss": sum(terms.values()), "terms": terms, "open": 61440}
            if step % 10 == 0 and 10 < step < 60:
                line |= {
                    "swapped": int(12288 * (1 + np.cos(np.pi * step / 60)) / 2),
                    "overlap": 1 - 0.2 * (1 + np.cos(np.pi * step / 60)) / 2,
                }
            lines.append(line)
    return lines


def draw(folder: Path, stage: int, side: int, styles: Sequence[str], objects: Sequence[str] = OBJECTS) -> None:
    folder.mkdir(parents=True)
    for row, name in enumerate(objects):
        for column, style in enumerate(styles):
            pixels = np.full((side, side, 3), (40 + 40 * column, 200 - 12 * row, 90), dtype=np.uint8)
            pixels[side // 4 : side // 2 + 2 * stage, side // 4 : 3 * side // 4] = (250, 240, 220)
            Image.fromarray(pixels).save(folder / f"{name}--{style}.png")


def write_run(
    folder: Path, targets: Sequence[str] = ("cat", "car"), side: int = 32, styles: Sequence[str] = STYLES
) -> Path:
    """A finished run of two concepts."""
    folder.mkdir(parents=True)
    concepts = [
        {"target": name, "superclass": broad, "kind": "object", "keep": []}
        for name, broad in zip(targets, ("animal", "vehicle"))
    ]
    config = {
        "model": {"path": "models/canvas-sd15", "arch": "sd15"},
        "concepts": concepts,
        "method": {"name": "dm_cal", "label_guidance": 1.0},
        "train": {"steps": 60, "batch": 8, "lr": 0.001, "seed": 0},
        "mask": {"keep": 0.5, "scope": "matrix"},
        "engine": {"stage": 2, "precision": "fp32"},
        "evaluate": {"enabled": True, "classifier": "canvas", "images": 10},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metric_lines()))
    for stage, name in enumerate(("before", "after-00", "after-01")):
        draw(folder / "evaluation" / name / "images", stage, side, styles)
        scores = {"plain": score_set(stage, targets), "paraphrased": score_set(stage, targets, worse=0.01)}
        (folder / "evaluation" / name / "scores.json").write_text(json.dumps(scores))
    costs = {
        "seconds": {"prepare": 21.5, "train": 48.25, "evaluate": 30.0, "total": 104.5},
        "cpu_seconds": {"prepare": 40.0, "train": 95.5},
        "passes": {"prepare": 4608, "train": 25200, "evaluate": 11520},
        "peak_memory_bytes": [1288490188, 1181116006],
        "weights": {"total": 1780000, "trained": 122880, "open": 61440},
        "bytes_communicated": 123456789,
        "ranks": 2,
    }
    (folder / "costs.json").write_text(json.dumps(costs))
    manifest = {
        "base": "b" * 64,
        "config": "c" * 64,
        "shards": {"cat-target-000.tar": "d" * 64},
        "code": "0.1.0",
        "finished": True,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


class Page(HTMLParser):
    """The parsed page: tags with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes, sort_keys=False))


def read_report(folder: Path) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"report.json holds {word}")

    return json.loads((folder / "report" / "report.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report; tests must not change it."""
    folder = write_run(tmp_path_factory.mktemp("finished") / "run")
    assert write_report(folder) == folder / "report" / "report.html"
    return folder


def expected_scores(stage: int) -> dict[str, Any]:
    def kept(members: dict[str, Any]) -> dict[str, Any]:
        missing = {"CTA": None, "CTA_ci95": None}
        return missing | {name: value for name, value in members.items() if name not in ("objects", "styles")}

    return {**kept(score_set(stage)), "paraphrased": kept(score_set(stage, worse=0.01))}


def test_report_json_holds_the_scores_and_costs_of_the_run(finished: Path) -> None:
    assert read_report(finished) == {
        "model": "models/canvas-sd15",
        "method": "dm_cal",
        "config": "c" * 64,
        "finished": True,
        "ranks": 2,
        "before": expected_scores(0),
        "after": expected_scores(2),
        "concepts": [
            {"target": "cat", "superclass": "animal", "kind": "object", **expected_scores(1)},
            {"target": "car", "superclass": "vehicle", "kind": "object", **expected_scores(2)},
        ],
        "relapse": [[0.0, 0.965], [0.031, 0.027]],
        "seconds": {"prepare": 21.5, "train": 48.25, "evaluate": 30.0, "total": 104.5},
        "cpu_seconds": {"prepare": 40.0, "train": 95.5},
        "passes": {"prepare": 4608, "train": 25200},
        "peak_memory_bytes": [1288490188, 1181116006],
        "weights": {"total": 1780000, "trained": 122880, "open": 61440},
        "bytes_communicated": 123456789,
    }
    assert read_report(finished)["after"]["UA"] == 0.971 and read_report(finished)["after"]["UA_ci95"] == [0.951, 0.991]


def test_every_figure_is_a_picture_that_is_not_blank(finished: Path) -> None:
    for name in ("grid", "loss", "mask", "relapse"):
        with Image.open(finished / "report" / f"{name}.png") as image:
            assert image.format == "PNG" and min(image.size) > 300, name
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 10, name
    assert not list((finished / "report").glob(".*")), "a partial file was left behind"


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


def test_relapse_has_one_row_per_step_and_null_where_a_step_was_not_evaluated(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", targets=("cat", "car"))
    concepts = [{"target": name, "superclass": "thing", "kind": "object"} for name in ("Cat", "car", "boat")]
    edit_config(folder, concepts=concepts)
    write_report(folder)
    report = read_report(folder)
    assert report["relapse"] == [[0.0, 0.965, None], [0.031, 0.027, None], [None, None, None]]
    assert report["after"]["UA"] == 0.971, "the last stage that was evaluated"
    assert report["concepts"][2]["UA"] is None and report["concepts"][2]["paraphrased"]["IRA_ci95"] is None
    words = Page(folder / "report" / "report.html").words
    assert "Evaluated so far: 2 of 3 concepts." in words and "after car" in words and "after boat" not in words


def test_the_later_of_two_lines_of_a_step_counts_and_steps_are_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [(0, 1, 2.0), (1, 0, 3.0), (0, 0, 1.0), (0, 1, 4.0)]
    path.write_text("".join(json.dumps({"concept": c, "step": s, "loss": loss}) + "\n" for c, s, loss in rows))
    lines, num_unreadable = read_metrics(path)
    assert [(line["concept"], line["step"], line["loss"]) for line in lines] == [(0, 0, 1.0), (0, 1, 4.0), (1, 0, 3.0)]
    assert num_unreadable == 0


@pytest.mark.parametrize("resumed", [False, True])
def test_a_line_that_a_kill_cut_off_is_skipped(tmp_path: Path, resumed: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"concept": 0, "step": step, "loss": 0.5}) for step in range(3)]
    path.write_text(
        "\n".join([*whole[:2], '{"concept": 0, "step": 2, "lo']) + ("" if not resumed else "\n" + whole[2] + "\n")
    )
    lines, num_unreadable = read_metrics(path)
    assert [line["step"] for line in lines] == ([0, 1, 2] if resumed else [0, 1])
    assert num_unreadable == 1


def test_a_run_without_evaluation_reports_curves_and_cost(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for path in sorted((folder / "evaluation").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / "evaluation").rmdir()
    page = Page(write_report(folder))
    assert page.count("img") == 2
    assert "Not evaluated." in page.words and "CRA" not in page.words
    report = read_report(folder)
    assert report["relapse"] == [[None, None], [None, None]]
    assert (
        report["after"]["UA"] is None and report["before"]["CRA_ci95"] is None and report["seconds"]["total"] == 104.5
    )
    assert sorted(path.name for path in (folder / "report").iterdir()) == [
        "loss.png",
        "mask.png",
        "report.html",
        "report.json",
    ]


def test_the_report_of_an_unfinished_run_shows_what_exists(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "costs.json", "manifest.json"):
        (folder / name).unlink()
    for stage in ("after-00", "after-01"):
        (folder / "evaluation" / stage / "scores.json").unlink()
    page = Page(write_report(folder))
    assert "only the base model has scores" in page.words
    report = read_report(folder)
    assert report["before"]["UA"] == 0.019 and report["after"]["UA"] is None
    assert report["peak_memory_bytes"] is None and report["weights"] == {"total": None, "trained": None, "open": None}
    assert report["cpu_seconds"] == {"prepare": None, "train": None} and report["config"] is None


def test_a_score_that_is_null_or_nan_is_null_and_shown_as_not_measured(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for stage in ("before", "after-00", "after-01"):
        path = folder / "evaluation" / stage / "scores.json"
        plain = json.loads(path.read_text())["plain"] | {"CRA": None, "CRA_ci95": None, "SA": math.nan, "SA_ci95": None}
        edit_json(path, plain=plain, paraphrased=None)
    page = Page(write_report(folder))
    report = read_report(folder)
    assert report["after"]["CRA"] is None and report["after"]["SA"] is None and report["after"]["IRA"] == 0.963
    assert report["after"]["paraphrased"]["UA"] is None
    assert page.words.count("not measured") == 2 and "paraphrased prompts" not in page.words


def test_curves_survive_a_nan_loss_and_a_term_that_starts_at_zero(tmp_path: Path) -> None:
    lines = metric_lines()
    lines[10]["terms"]["distill"] = 0.0
    lines[12]["loss"] = lines[12]["terms"]["forget"] = math.nan
    lines[13]["terms"]["forget"] = math.inf
    axes = draw_loss(lines, ["cat", "car"]).axes[0]
    assert axes.get_yscale() == "log"
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        "collecting saliency",
        "forget",
        "retain",
        "distill",
    }
    lines[20]["terms"]["forget"] = -1.0
    assert draw_loss(lines, ["cat", "car"]).axes[0].get_yscale() == "linear"


def test_the_open_share_refers_to_the_trained_weights_and_a_method_without_mask_has_no_mask_figure() -> None:
    top = draw_mask(metric_lines(), ["cat", "car"], 122880).axes[0]
    drawn = np.concatenate([line.get_ydata() for line in top.get_lines() if len(line.get_ydata()) > 2])
    assert set(drawn) == {0.5}
    bare = [
        {name: value for name, value in line.items() if name not in ("open", "swapped", "overlap")}
        for line in metric_lines()
    ]
    assert draw_mask(bare, ["cat", "car"], 122880) is None


def test_the_grid_shows_targets_first_then_the_order_of_the_evaluation(tmp_path: Path) -> None:
    draw(tmp_path / "before", 0, 32, ("natural", "neon"), objects=("cat", "chain_saw", "boat"))
    draw(tmp_path / "after", 2, 32, ("natural",), objects=("cat", "chain_saw"))
    grid = read_grid(
        tmp_path / "before", tmp_path / "after", names=("boat", "cat", "Chain saw"), targets=("Chain saw", "neon")
    )
    rows = [row for band in grid.bands for row in band]
    assert [(row.name, row.is_target) for row in rows] == [("Chain saw", True), ("boat", False), ("cat", False)]
    assert grid.styles == ["neon", "natural"] and grid.style_is_target == [True, False]
    assert [picture is None for picture in rows[1].sides[1]] == [True, True], "boat has no image after"
    assert [picture is None for picture in rows[2].sides[1]] == [True, False]


def test_tiny_images_are_enlarged_without_smoothing_and_large_ones_are_smoothed(tmp_path: Path) -> None:
    for side in (32, 512):
        draw(tmp_path / f"{side}", 0, side, ("none",), objects=("cat",))
        grid = read_grid(tmp_path / f"{side}", None, names=(), targets=("cat",))
        thumb = grid.bands[0][0].sides[0][0]
        assert thumb.size == (192, 192) and grid.is_tiny is (side == 32)
    draw(tmp_path / "sharp", 0, 32, ("none",), objects=("cat",))
    thumb = read_grid(tmp_path / "sharp", None, names=(), targets=()).bands[0][0].sides[0][0]
    with Image.open(tmp_path / "sharp" / "cat--none.png") as image:
        assert np.array_equal(np.asarray(thumb), np.asarray(image.convert("RGB")).repeat(6, 0).repeat(6, 1))


def test_the_grid_limits_objects_and_styles_and_reserves_places_for_other_than_targets(tmp_path: Path) -> None:
    names = [f"thing {at:02d}" for at in range(20)]
    draw(tmp_path / "before", 0, 8, [f"style {at}" for at in range(9)], objects=names)
    grid = read_grid(tmp_path / "before", None, names=names, targets=names[:15])
    rows = [row for band in grid.bands for row in band]
    assert (len(rows), grid.num_shown, grid.num_objects, len(grid.styles), grid.num_styles) == (12, 12, 20, 6, 9)
    assert [row.name for row in rows if not row.is_target] == names[15:19]


def test_errors_name_a_folder_that_is_not_a_run_and_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="config.yaml"):
        write_report(tmp_path)
    folder = write_run(tmp_path / "run")
    (folder / "evaluation" / "after-00" / "scores.json").write_text('{"plain": {')
    with pytest.raises(RunFolderError, match="after-00/scores.json is damaged"):
        write_report(folder)
    edit = write_run(tmp_path / "other")
    (edit / "evaluation" / "before" / "images" / "cat--neon.png").write_bytes(b"\x89PNG")
    with pytest.raises(RunFolderError, match="cat--neon.png is damaged"):
        write_report(edit)


def test_a_new_report_replaces_the_earlier_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_report(folder)
    edit_json(folder / "costs.json", ranks=4)
    write_report(folder)
    assert read_report(folder)["ranks"] == 4


def card_parts(folder: Path, report: dict[str, Any]) -> tuple[dict[str, Any], str]:
    card = model_card(yaml.safe_load((folder / "config.yaml").read_text()), report)
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_front_matter_of_the_card_is_yaml_and_names_the_base_only_if_it_is_on_the_hub(
    finished: Path, tmp_path: Path
) -> None:
    front, _ = card_parts(write_run(tmp_path / "hub"), {})
    assert front.pop("base_model") == "models/canvas-sd15"
    assert front == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["unlearning", "sculpt-dist"],
    }
    for path in (None, "/home/me/sd15", "sd15", "./models/sd15", str(finished)):
        edit_config(tmp_path / "hub", model={"path": path, "arch": "sd15"})
        front, body = card_parts(tmp_path / "hub", {})
        assert "base_model" not in front, path
        assert "/home/me" not in body


def test_the_card_shows_scores_with_intervals_settings_and_limits(finished: Path) -> None:
    _, body = card_parts(finished, read_report(finished))
    assert "| UA | 1.9 (0.0 to 3.9) | 97.1 (95.1 to 99.1) |" in body
    assert "| UA, paraphrased prompts | 0.9 (0.0 to 2.9) | 96.1 (94.1 to 98.1) |" in body
    assert "| car | object | vehicle |" in body and "| mask.keep | 0.5 |" in body
    assert "classifier `canvas` on 210 images of targets and 630 other images" in body
    assert 'pipeline("a photo of an animal")' in body
    headings = re.findall(r"^## (.*)$", body, flags=re.MULTILINE)
    assert headings == ["Base model", "Concepts removed", "Method", "Scores", "How to load", "Limits", "Licence"]


def test_the_card_states_when_nothing_was_measured(finished: Path) -> None:
    _, body = card_parts(finished, {})
    assert (
        "This model was not evaluated." in body and "Forgetting was not measured." in body and "classifier" not in body
    )


def test_a_concept_name_cannot_break_the_card(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", targets=("<script> | *x*\n---\n`y`", "car"))
    front, body = card_parts(folder, {})
    assert front["library_name"] == "diffusers"
    assert "| \\<script\\> \\| \\*x\\* --- \\`y\\` | object | animal |" in body
