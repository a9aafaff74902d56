"""What a tracker is told; one file per tracker beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sculpt_dist.config.schema import RunConfig

if TYPE_CHECKING:
    from PIL.Image import Image

DONE, STOPPED, FAILED = "done", "stopped", "failed"
SCORES = ("UA", "IRA", "CRA", "SA")
GROUPS = {"terms": "loss", "time_shares": "time"}  # a part of an entry -> its name in a tracker


class Sink(ABC):
    """One tracker. Steps count on over the concepts, from `step` on in this sitting."""

    replays = False  # whether a new sitting tells it again what the run said before
    shows = True  # whether it wants scores and pictures

    @abstractmethod
    def __init__(self, config: RunConfig, folder: Path, step: int) -> None: ...

    @abstractmethod
    def log(self, entry: Mapping[str, Any]) -> None:
        """One step, as metrics.jsonl holds it."""

    @abstractmethod
    def stage(self, step: int, stage: str, scores: Mapping[str, Any], picture: Image | None) -> None:
        """The scores of a stage by name, and its grid of samples."""

    @abstractmethod
    def finish(self, step: int, report: Mapping[str, Any], model: Path) -> None:
        """The content of report.json and the folder of the model, when all is done."""

    @abstractmethod
    def close(self, outcome: str) -> None:
        """The sitting has ended: DONE, STOPPED or FAILED."""


def numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an entry by flat names: `loss/forget`, `time/forward`, `saliency/0.5`."""
    flat = {}
    for key, value in entry.items():
        if isinstance(value, Mapping):
            flat |= {f"{GROUPS.get(key, key)}/{name}": member for name, member in value.items()}
        elif isinstance(value, (int, float)):
            flat[key] = value
    return flat


def score_numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """The scores that there are, as `score/UA`."""
    return {f"score/{name}": scores[name] for name in SCORES if scores.get(name) is not None}
