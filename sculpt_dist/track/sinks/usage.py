"""usage.jsonl: what the process takes of its machine by each concept, to see whether a long sequence leaks or slows."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sculpt_dist.config.schema import TrackConfig
from sculpt_dist.core.files import writing
from sculpt_dist.core.usage import usage
from sculpt_dist.track.sinks import base

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = "usage.jsonl"


class Sink(base.Sink):
    """A line after the first step of each concept. `session` tells sessions apart: counts begin anew in each."""

    shows = False

    def __init__(self, track: TrackConfig, values: Mapping[str, Any], folder: Path, step: int) -> None:
        self._path, self._session, self._concept = folder / FILE, time.time(), -1
        with writing(self._path):
            self._file = self._path.open("a", buffering=1)

    def log(self, entry: Mapping[str, Any]) -> None:
        if entry["concept"] == self._concept:
            return
        self._concept = entry["concept"]
        line = {"concept": self._concept, "session": self._session, "time": time.time(), **usage()}
        with writing(self._path):
            self._file.write(json.dumps(line) + "\n")

    def stage(self, step: int, stage: str, scores: Mapping[str, Any], picture: Image | None) -> None:
        """Nothing: only the machine counts."""

    def finish(self, step: int, report: Mapping[str, Any], model: Path) -> None:
        """Nothing."""

    def close(self, outcome: str) -> None:
        with contextlib.suppress(OSError):  # `log` has told
            self._file.close()
