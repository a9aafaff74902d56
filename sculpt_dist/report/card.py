"""The model card of an exported model: what was removed, how, how well it worked, and its limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sculpt_dist.report.render import render
from sculpt_dist.report.summary import SCORES

SECTIONS = ("method", "train", "mask", "engine")  # sections of the configuration that the card lists as settings
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name


def model_card(config: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The README.md of the exported folder.

    `config`: the resolved configuration; `report`: the content of report.json, which may be empty.
    """
    from huggingface_hub import ModelCardData

    model, evaluate = config.get("model") or {}, config.get("evaluate") or {}
    path = model.get("path")
    is_hub_id = path is not None and HUB_ID.fullmatch(path) is not None and not Path(path).exists()
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["unlearning", "sculpt-dist"],
        base_model=path if is_hub_id else None,
    )
    concepts = [{"superclass": None, "kind": "object", **concept} for concept in config["concepts"]]
    body = render(
        "card.md",
        {"plain": _plain, "code": _code},
        base=path or f"canvas-{model.get('arch')}",
        concepts=concepts,
        example=next((concept["superclass"] for concept in concepts if concept["superclass"]), "house"),
        method=config["method"]["name"],
        settings={
            f"{name}.{key}": value
            for name in SECTIONS
            for key, value in (config.get(name) or {}).items()
            if key != "name"
        },
        scores=SCORES,
        report=report,
        before_is_scored=_is_scored(report.get("before")),
        after_is_scored=_is_scored(report.get("after")),
        images=(report.get("after") or {}).get("images"),
        classifier=evaluate.get("classifier"),
    )
    return f"---\n{data.to_yaml().strip()}\n---\n\n{body}"


def _is_scored(record: Mapping[str, Any] | None) -> bool:
    return any((record or {}).get(score) is not None for score in SCORES)


def _plain(text: Any) -> str:
    """A user's text with markup escaped and line breaks removed, safe inside a table cell."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(str(text).split()))


def _code(text: Any) -> str:
    """A user's text without the characters that would end backticks or quotes."""
    return re.sub(r'[`"\\\n]', "'", " ".join(str(text).split()))
