"""What a run folder holds: its configuration, metrics, scores, costs and manifest, read back from the files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sculpt_dist.config.checks import normal
from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.core.files import read_object


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder; whatever is missing is empty."""

    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    """Lines of metrics.jsonl in order, one per (concept, step)."""
    num_unreadable: int
    """Lines of metrics.jsonl that a kill cut off."""
    stages: dict[str, dict[str, Any]]
    """Content of scores.json by stage: "before", then "after-00" and on for every concept; empty where missing."""
    outdated: list[str]
    """Stages whose scores are left out of `stages`: they were made by other settings than those of the last stage."""
    costs: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def targets(self) -> list[str]:
        return [str(concept["target"]) for concept in self.config["concepts"]]

    @property
    def last(self) -> str | None:
        """The last evaluated stage after a concept."""
        return next((name for name in reversed(self.stages) if name != "before" and self.stages[name]), None)

    @property
    def accuracies(self) -> list[list[float | None]]:
        """Share of each target's images recognised as that target (columns) in every stage (rows), the base first."""
        found = [
            {normal(name): member for name, member in plain_scores(stage, "targets").items()}
            for stage in self.stages.values()
        ]
        return [[stage.get(normal(target), {}).get("accuracy") for target in self.targets] for stage in found]


def read_run(folder: Path) -> RunRecord:
    """Read a run folder; the run may still be going on.

    Raises RunFolderError if the folder has no configuration or one of its files is damaged.
    """
    config = _read_config(folder / "config.yaml")
    names = ["before", *(f"after-{k:02d}" for k in range(len(config["concepts"])))]
    lines, num_unreadable = read_metrics(folder / "metrics.jsonl")
    stages = {name: _read_json(folder / "evaluation" / name / "scores.json") for name in names}
    made_by = {name: scores["plain"].get("made_by") for name, scores in stages.items() if scores.get("plain")}
    last = next(reversed(made_by.values()), None)
    outdated = [name for name, made in made_by.items() if made != last]
    return RunRecord(
        folder=folder,
        config=config,
        lines=lines,
        num_unreadable=num_unreadable,
        stages={name: {} if name in outdated else scores for name, scores in stages.items()},
        outdated=outdated,
        costs=_read_json(folder / "costs.json"),
        manifest=_read_json(folder / "manifest.json"),
    )


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics.jsonl in order of (concept, step), and the number of unreadable lines that a kill cut off.

    If a step has two lines, the later one counts.
    """
    if not path.is_file():
        return [], 0
    lines, num_unreadable = {}, 0
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
            lines[line["concept"], line["step"]] = line
        except (ValueError, KeyError, TypeError):  # not only the last line: a resumed run appends after a partial one
            num_unreadable += bool(text.strip())
    return [lines[key] for key in sorted(lines)], num_unreadable


def plain_scores(stage: Mapping[str, Any], member: str) -> Mapping[str, Any]:
    """One entry of a stage's scores on plain (not paraphrased) prompts, such as the accuracies by object."""
    return (stage.get("plain") or {}).get(member) or {}


def _read_config(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else None
    except (OmegaConfBaseException, YAMLError) as error:
        raise RunFolderError(
            f"{path} is damaged ({error}): name the output folder of a run, or start the run again"
        ) from error
    if not isinstance(config, dict) or not config.get("concepts"):
        raise RunFolderError(f"{path} is missing or names no concepts: name the output folder of a run")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content: dict[str, Any] = _without_nan(read_object(path, "remove it and repeat the command that writes it"))
    return content


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_without_nan(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
