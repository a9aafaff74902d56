"""metrics.jsonl: one line per step. Every run has it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sculpt_dist.config.schema import TrackConfig
from sculpt_dist.core.files import sealed, write_atomically, writing
from sculpt_dist.report.steps import read_metrics
from sculpt_dist.track.sinks import base

if TYPE_CHECKING:
    from PIL.Image import Image


class Sink(base.Sink):
    shows = False

    def __init__(self, track: TrackConfig, values: Mapping[str, Any], folder: Path, step: int) -> None:
        self._path = folder / "metrics.jsonl"
        with writing(self._path):
            self._file = self._path.open("a", buffering=1)

    def log(self, entry: Mapping[str, Any]) -> None:
        with writing(self._path):
            self._file.write(json.dumps(sealed(entry)) + "\n")

    def stage(self, step: int, stage: str, scores: Mapping[str, Any], picture: Image | None) -> None:
        """Nothing: the run folder already holds them."""

    def finish(self, step: int, report: Mapping[str, Any], model: Path) -> None:
        """Nothing: the run folder already holds them."""

    def close(self, outcome: str) -> None:
        with contextlib.suppress(OSError):  # `log` has told
            self._file.close()


def truncate_metrics(file: Path, position: tuple[int, int]) -> list[dict[str, Any]]:
    """Remove damaged lines and the lines from `position` (concept, step) on, which will be repeated.

    Returns the remaining lines in order.
    """
    steps = read_metrics(file)
    kept = [line for line in steps.lines if (line["concept"], line["step"]) < position]
    if not steps.is_whole or len(kept) < len(steps.lines):
        write_atomically(file, "".join(json.dumps(sealed(line)) + "\n" for line in kept).encode())
    return kept
