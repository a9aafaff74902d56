"""The model card of an exported model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from handmade_run import edit_config, read_report, write_run

from sculpt_dist.report.card import model_card


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
