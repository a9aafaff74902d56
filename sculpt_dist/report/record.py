"""What a run folder holds: its configuration, metrics, scores, costs and manifest, read back from the files.

Every value that the report uses is checked here once, so that what follows can rely on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sculpt_dist.config.checks import normal
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.core.files import file_sha256, is_text_intact, read_object
from sculpt_dist.core.messages import shortlist
from sculpt_dist.report.shapes import ATTACKS, CONFIG, COSTS, MANIFEST, SCORES, Shape, fault
from sculpt_dist.report.steps import Steps, read_metrics, step_notes

MOST_LINES = 100_000  # of metrics.jsonl that a report shows
CONCEPTS_A_PAGE = 100


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder; whatever is missing is empty."""

    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    """Steps, from the lines of metrics.jsonl, in order."""
    notes: list[str]
    """What is damaged, missing or left out, in sentences."""
    stages: dict[str, dict[str, Any]]
    """Content of scores.json by stage: "before", then "after-00" and on for every concept; empty where missing."""
    costs: dict[str, Any]
    manifest: dict[str, Any]
    attacks: dict[str, Any]
    """Content of attacks.json; empty where nothing was attacked."""

    @property
    def targets(self) -> list[str]:
        return [str(concept["target"]) for concept in self.config["concepts"]]

    @property
    def is_long(self) -> bool:
        """Whether the report has several pages, and leaves out what grows with the square of the concepts."""
        return len(self.config["concepts"]) > CONCEPTS_A_PAGE

    @property
    def last(self) -> str | None:
        """The last evaluated stage after a concept."""
        return next(reversed(self.scored_stages), None)

    @property
    def scored_stages(self) -> list[str]:
        """The evaluated stages after a concept."""
        return [name for name, scores in self.stages.items() if name != "before" and scores]

    @cached_property
    def accuracies(self) -> list[list[float | None]]:
        """Share of each target's images recognised as that target (columns) in every stage (rows), the base first."""
        targets = [normal(target) for target in self.targets]
        rows: list[list[float | None]] = []
        unmeasured: list[float | None] = [None] * len(targets)
        for scores in self.stages.values():
            found = {normal(name): member.get("accuracy") for name, member in plain_scores(scores, "targets").items()}
            rows.append([found.get(target) for target in targets] if found else unmeasured)
        return rows


def first_concept(config: Mapping[str, Any]) -> int:
    """The concept with which training began: where all train together, the last one stands for them."""
    return len(config["concepts"]) - 1 if (config.get("train") or {}).get("together") else 0


def read_run(folder: Path, with_steps: bool = True) -> RunRecord:
    """Read a run folder, or all of it but its steps; the run may still be going on.

    Raises RunFolderError if the folder has no configuration or one of its files is damaged.
    """
    config, is_changed = _read_config(folder / "config.yaml")
    costs, manifest = _read_json(folder / "costs.json", COSTS), _read_json(folder / "manifest.json", MANIFEST)
    names = ["before", *(f"after-{k:02d}" for k in range(len(config["concepts"])))]
    stages = {name: read_scores(folder, name) for name in names}
    made_by = {name: scores["plain"].get("made_by") for name, scores in stages.items() if scores.get("plain")}
    last = next(reversed(made_by.values()), None)
    outdated = {name: made for name, made in made_by.items() if made != last}
    steps = read_metrics(folder / "metrics.jsonl", MOST_LINES) if with_steps else Steps([])
    num_finished = len(config["concepts"]) if manifest.get("finished") else 0
    notes = step_notes(steps, num_finished, first_concept(config))
    if with_steps and manifest.get("finished") and manifest.get("shards") and not steps.lines:
        notes.append("metrics.jsonl holds no step of the run.")
    if is_changed:
        notes.append("config.yaml was changed after the run wrote it.")
    if outdated:
        notes.append(
            f"The scores of {', '.join(shortlist(list(outdated)))} were made with other settings of evaluate than the "
            "last ones, and are left out."
        )
    attacks = _read_json(folder / "attacks" / "attacks.json", ATTACKS)
    if attacks and not _is_of_model(attacks, folder):
        notes.append("The attacks were made on another model than the run's, and are left out: attack it again.")
        attacks = {}
    return RunRecord(
        folder=folder,
        config=config,
        lines=steps.lines,
        notes=notes,
        stages={name: {} if name in outdated else scores for name, scores in stages.items()},
        costs=costs,
        manifest=manifest,
        attacks=attacks,
    )


def _is_of_model(attacks: Mapping[str, Any], folder: Path) -> bool:
    """Whether attacks were made on the model that the run exported, as far as its checksums are there to tell."""
    checksums, written = folder / "model" / "CHECKSUMS", attacks.get("checksums")
    return not checksums.is_file() or written is None or file_sha256(checksums) == written


def read_scores(folder: Path, stage: str) -> dict[str, Any]:
    """The content of a stage's scores.json; empty where it is missing. Raises RunFolderError for a damaged one."""
    return _read_json(folder / "evaluation" / stage / "scores.json", SCORES)


def plain_scores(stage: Mapping[str, Any], member: str) -> Mapping[str, Any]:
    """One entry of a stage's scores on plain (not paraphrased) prompts, such as the accuracies by object."""
    return (stage.get("plain") or {}).get(member) or {}


def _read_config(path: Path) -> tuple[dict[str, Any], bool]:
    """A run's configuration, and whether it was changed after the run wrote it."""
    from yaml import YAMLError

    from sculpt_dist.config.scalars import read_text

    remedy = "name the output folder of a run, or start the run again"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        config = read_text(text, RunConfig)
    except (OSError, UnicodeDecodeError, YAMLError, RecursionError) as error:
        raise RunFolderError(f"{path} is damaged ({' '.join(str(error).split())[:300]}): {remedy}") from error
    if not isinstance(config, dict) or not config.get("concepts"):
        raise RunFolderError(f"{path} is missing or names no concepts: {remedy}")
    lacking = [key for key in ("model", "method") if not isinstance(config.get(key), dict)]
    lacking += [] if lacking or config["method"].get("name") else ["method.name"]
    wrong = f"it lacks {lacking[0]}" if lacking else fault(config, CONFIG)
    if wrong:
        raise RunFolderError(f"{path} is damaged ({wrong}): {remedy}")
    return config, is_text_intact(text) is False


def _read_json(path: Path, shape: Shape) -> dict[str, Any]:
    if not path.exists():
        return {}
    remedy = "remove it and repeat the command that writes it"
    content: dict[str, Any] = _plain(read_object(path, remedy))
    wrong = fault(content, shape)
    if wrong:
        raise RunFolderError(f"{path} is damaged ({wrong}): {remedy}")
    return content


def _plain(value: Any) -> Any:
    """The value with None for numbers that are not finite, and without halves of characters."""
    if isinstance(value, dict):
        return {_plain(key): _plain(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_plain(member) for member in value]
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value
