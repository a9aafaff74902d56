"""The model card of an exported model: what was removed, how, how well it worked, and its limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from sculpt_dist.core.messages import shortlist
from sculpt_dist.report.render import render
from sculpt_dist.report.summary import SCORES

SECTIONS = (
    "method",
    "hold",
    "train",
    "mask",
    "engine",
)  # sections of the configuration that the card lists as settings
PIPELINE = "text-to-image"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name


def model_card(
    config: Mapping[str, Any],
    report: Mapping[str, Any],
    options: Mapping[str, Any] = {},
    licence: Mapping[str, Any] = {},
    adapter: str | None = None,
) -> str:
    """The README.md of the exported folder, or of the folder of an adapter.

    `config`: the resolved configuration; `report`: the content of report.json, which may be empty. `options`: what a
    call of the pipeline is given beside the prompt. `licence`: see `licence_of`. `adapter`: of one, what it lacks.
    """
    evaluate = config.get("evaluate") or {}
    path, name = (config.get("model") or {}).get("path"), title(config)
    is_hub_id = path is not None and HUB_ID.fullmatch(path) is not None and not Path(path).exists()
    after = report.get("after") or {}
    concepts = [{"superclass": None, "kind": "object", **concept} for concept in config["concepts"]]
    body = render(
        "card.md",
        {"plain": _plain, "code": _code},
        title=name,
        base=base_name(config),
        is_hub_id=is_hub_id,
        adapter=adapter,
        guard=report.get("guard"),
        concepts=concepts,
        together=(config.get("train") or {}).get("together", False),
        named=[_plain(name) for name in shortlist([concept["target"] for concept in concepts])],
        example=next((concept["superclass"] for concept in concepts if concept["superclass"]), "house"),
        options="".join(f", {name}={value!r}" for name, value in options.items()),
        method=config["method"]["name"],
        settings={
            f"{name}.{key}": value
            for name in SECTIONS
            for key, value in (config.get(name) or {}).items()
            if key != "name" and not (name == "hold" and (config["hold"] or {}).get("prompts") is None)
        },
        scores=SCORES,
        report=report,
        before_is_scored=_is_scored(report.get("before")),
        after_is_scored=_is_scored(report.get("after")),
        images=after.get("images"),
        classifier=evaluate.get("classifier"),
    )
    attacks = (report.get("attacks") or {}).get("attacks") or {}
    classifier, hub_id = str(evaluate.get("classifier")), path if is_hub_id else None
    front = _front_matter(name, hub_id, classifier, after, attacks, licence, adapter)
    return f"---\n{front}\n---\n\n{body}"


def _without_folder(classifier: str) -> str:
    """clip:FOLDER without its folder, which lies on the user's machine; a world's classifier whole."""
    kind = classifier.partition(":")[0]
    return kind if kind in ("clip", "image", "own") else classifier


def _front_matter(
    name: str,
    hub_id: str | None,
    classifier: str,
    after: Mapping[str, Any],
    attacks: Mapping[str, Any],
    licence: Mapping[str, Any],
    adapter: str | None,
) -> str:
    """The card's yaml, which the hub reads; `after`: the last scores; `attacks`: the rates of each."""
    from huggingface_hub import EvalResult, ModelCardData
    from huggingface_hub.utils import yaml_dump

    model_name = " ".join(name.split())
    results = [
        EvalResult(
            task_type=PIPELINE,
            dataset_type="generated",
            dataset_name=f"images of the evaluation, judged by {_without_folder(classifier)}",
            metric_type=score,
            metric_value=round(after[score], 4),
        )
        for score in SCORES
        if adapter is None and after.get(score) is not None
    ]
    results += [
        EvalResult(
            task_type=PIPELINE,
            dataset_type="generated",
            dataset_name=f"images of the attack {attack}, judged by {_without_folder(classifier)}",
            metric_type=f"ASR_{attack}",
            metric_value=round(rates["post"], 4),
        )
        for attack, rates in attacks.items()
        if adapter is None and rates.get("post") is not None
    ]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=PIPELINE,
        tags=["unlearning", "sculpt-dist", *(["lora"] if adapter else [])],
        base_model=hub_id,
        model_name=model_name,
        eval_results=results or None,
        **cast(dict[str, Any], dict(licence)),
    )
    return str(yaml_dump({"model_name": model_name} | data.to_dict(), sort_keys=False)).strip()


def base_name(config: Mapping[str, Any]) -> str:
    """The base model's hub id, or the last part of its place."""
    model = config.get("model") or {}
    path = model.get("path") or f"{model.get('world', 'canvas')}-{model.get('arch')}"
    return path if path.count("/") == 1 and path[0] not in "./~" else path.rstrip("/").split("/")[-1]


def title(config: Mapping[str, Any]) -> str:
    """The name of the result: that of the base, without the concepts."""
    *first, last = shortlist([concept["target"] for concept in config["concepts"]])
    return f"{base_name(config)} without {' and '.join([', '.join(first), last] if first else [last])}"


def licence_of(folder: Path) -> dict[str, str]:
    """What the model card in a folder says of its licence, by the keys of a card; empty where it says nothing."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        found = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, YAMLError, RecursionError):
        return {}
    return {
        key: str(found[key]) for key in ("license", "license_name", "license_link") if isinstance(found.get(key), str)
    }


def _is_scored(record: Mapping[str, Any] | None) -> bool:
    return any((record or {}).get(score) is not None for score in SCORES)


def _plain(text: Any) -> str:
    """A user's text with markup escaped and line breaks removed, safe inside a table cell."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(str(text).split()))


def _code(text: Any) -> str:
    """A user's text without the characters that would end backticks or quotes."""
    return re.sub(r'[`"\\\n]', "'", " ".join(str(text).split()))
