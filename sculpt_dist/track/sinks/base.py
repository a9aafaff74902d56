"""The interface of a tracker, and the flat names under which trackers show numbers."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sculpt_dist.config.schema import TrackConfig

if TYPE_CHECKING:
    from PIL.Image import Image

DONE, STOPPED, FAILED = "done", "stopped", "failed"
SCORES = ("UA", "IRA", "CRA", "SA")
GROUPS = {"terms": "loss", "time_shares": "time"}  # a member of an entry -> the prefix of its numbers


class Sink(ABC):
    """One tracker in one session of a run. Steps are numbered across concepts; the session starts at `step`."""

    package: str | None = None  # the package that must be installed
    install: str = ""  # the command that installs it
    replays = False  # whether a new session sends the steps of earlier sessions again
    shows = True  # whether it receives scores and pictures

    @abstractmethod
    def __init__(self, track: TrackConfig, values: Mapping[str, Any], folder: Path, step: int) -> None:
        """`values`: the whole configuration as plain dicts and lists, without values of the environment."""

    @abstractmethod
    def log(self, entry: Mapping[str, Any]) -> None:
        """Record one step, an entry of metrics.jsonl."""

    @abstractmethod
    def stage(self, step: int, stage: str, scores: Mapping[str, Any], picture: Image | None) -> None:
        """Record the scores of a stage by name, and its sample grid.

        `scores["paraphrased"]` holds those of paraphrased prompts, None without such prompts.
        """

    @abstractmethod
    def finish(self, step: int, report: Mapping[str, Any], model: Path) -> None:
        """Record the final report (the content of report.json) and the exported model's folder."""

    @abstractmethod
    def close(self, outcome: str) -> None:
        """Release everything at the end of the session; `outcome` is DONE, STOPPED or FAILED."""


def numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an entry under flat names: `loss/forget`, `time/forward`, `saliency/0.5`."""
    flat: dict[str, float] = {}
    for key, value in entry.items():
        if key == "steps":  # the same in all entries
            continue
        if isinstance(value, Mapping):
            flat |= {f"{GROUPS.get(key, key)}/{name}": member for name, member in value.items()}
        elif isinstance(value, (int, float)):
            flat[key] = value
    return flat


def score_numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """The measured scores, as `score/UA`, and those of paraphrased prompts, as `score/paraphrased/UA`."""
    parts = {"score": scores, "score/paraphrased": scores.get("paraphrased") or {}}
    return {
        f"{prefix}/{name}": part[name]
        for prefix, part in parts.items()
        for name in SCORES
        if part.get(name) is not None
    }


def settings(values: Mapping[str, Any]) -> dict[str, bool | str | float]:
    """A configuration under flat dotted names, each value as a number, a truth value or text."""
    flat: dict[str, bool | str | float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= {f"{key}.{name}": member for name, member in settings(value).items()}
        else:
            flat[key] = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
    return flat
