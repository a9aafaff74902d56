"""The model card of an exported model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from handmade_run import edit_config, read_report, write_run
from harness import PROJECT

from sculpt_dist.backbones.io.writing import write_pipeline
from sculpt_dist.backbones.parts.options import Options
from sculpt_dist.core.plugins import plugin, plugins
from sculpt_dist.report.card import licence_of, model_card


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
        "model_name": "models/canvas-sd15 without cat and car",
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
    assert headings == [
        "Base model",
        "Concepts removed",
        "Method",
        "Scores",
        "Attacks",
        "How to load",
        "Limits",
        "Licence",
    ]
    assert "No attack was tried." in body


def test_the_front_matter_holds_the_scores_as_a_model_index(finished: Path) -> None:
    front, _ = card_parts(finished, read_report(finished))
    (entry,) = front["model-index"]
    metrics = {metric["type"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}
    assert entry["name"] == front["model_name"] == "models/canvas-sd15 without cat and car"
    assert metrics == {"UA": 0.971, "SA": 0.93, "IRA": 0.963, "CRA": 0.976}
    assert "model-index" not in card_parts(finished, {})[0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: openrail++\n---\n# Base", {"license": "openrail++"}),
        (
            "---\nlicense: other\nlicense_name: sai\nlicense_link: LICENSE.md\ntags: [a]\n---\n",
            {"license": "other", "license_name": "sai", "license_link": "LICENSE.md"},
        ),
        ("---\nlicense: [1, 2]\n---\n", {}),
        ("---\nlicense: {\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("# no front matter", {}),
        (None, {}),
    ],
)
def test_the_licence_is_what_the_card_of_the_base_says(tmp_path: Path, finished: Path, text: str, found: dict) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == found
    card = model_card(yaml.safe_load((finished / "config.yaml").read_text()), {}, licence=licence_of(tmp_path))
    front = yaml.safe_load(card.split("---\n", 2)[1])
    assert {key: value for key, value in front.items() if key.startswith("license")} == found


@pytest.mark.parametrize("arch", plugins("sculpt_dist.backbones"))
@pytest.mark.parametrize("size", [None, 64])
def test_the_snippet_of_the_card_runs_on_an_exported_model(tmp_path: Path, arch: str, size: int | None) -> None:
    """With one step in place of the default number, which takes long."""
    import diffusers

    base = PROJECT / "sculpt_dist" / "assets" / "canvas" / arch
    backbone = plugin("sculpt_dist.backbones", arch, "").Backbone(
        base, torch.float32, torch.device("cpu"), Options(image_size=size)
    )
    write_pipeline(base, tmp_path / "model", backbone.net_name, torch.float32, backbone.stored_weights())
    config = {
        "model": {"path": None, "arch": arch},
        "concepts": [{"target": "cat", "superclass": "animal"}],
        "method": {"name": "dm_cal"},
    }
    card = model_card(config, {}, backbone.pipeline_options())
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    snippet = snippet.replace("path/to/this/folder", str(tmp_path / "model"))
    names: dict[str, Any] = {}
    exec(snippet.replace('animal"', 'animal", num_inference_steps=1'), names)  # noqa: S102 (our own text)
    assert isinstance(names["pipeline"], getattr(diffusers, backbone.pipeline_class))
    assert names["image"].size == (size or 32, size or 32)


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
