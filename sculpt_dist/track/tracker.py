"""What a run says while it runs: metrics.jsonl always, Weights & Biases and TensorBoard when asked for. A tracker is one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import TracebackType
from typing import Any

from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError, StopRequested
from sculpt_dist.core.plugins import plugin
from sculpt_dist.report.report import draw_stage
from sculpt_dist.track.base import DONE, FAILED, STOPPED, Sink
from sculpt_dist.track.jsonl import truncate_metrics

OPTIONAL = ("wandb", "tensorboard")  # the key of `track`, the file here, the package, and the extra that installs it


def check_tracking(config: RunConfig) -> None:
    """Raises ConfigError when a tracker that was asked for is not installed."""
    for name in _asked_for(config):
        try:
            distribution(name)
        except PackageNotFoundError:
            raise ConfigError(
                f"track.{name}=true: the package {name} is not installed: pip install 'sculpt-dist[{name}]', or track.{name}=false"
            ) from None


class Tracker:
    """The trackers of a run, on the first rank; on the others every call does nothing. Leaving (`with`) closes them.

    metrics.jsonl is the truth: every step stands in it once. A run that goes on removes the lines of steps that will be done again,
    and tells a tracker that needs it (see `Sink.replays`) what the lines hold, so that a kill leaves no gap there either.
    """

    def __init__(self, config: RunConfig, folder: Path, active: bool) -> None:
        self._config, self._folder, self._active = config, folder, active
        self._sinks: list[Sink] = []
        self._step = 0  # the next one

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close(DONE if kind is None else STOPPED if kind is StopRequested else FAILED)

    def start(self, concept: int = 0, step: int = 0, steps: int = 0) -> None:
        """Open the trackers where the run goes on: `step` of `concept`, `steps` each."""
        if not self._active:
            return
        lines = truncate_metrics(self._folder / "metrics.jsonl", (concept, step))
        self._step = concept * steps + step
        for name in ("jsonl", *_asked_for(self._config)):
            self._sinks.append(plugin("sculpt_dist.track", name, "track").Sink(self._config, self._folder, self._step))
        before = None
        for line in lines:
            if line["concept"] != before:
                before = line["concept"]
                self._log_stage(stage_after(before - 1), line["global_step"], replayed=True)
            for sink in self._sinks:
                if sink.replays:
                    sink.log(line)

    def log(self, entry: Mapping[str, Any]) -> None:
        """One step."""
        for sink in self._sinks:
            sink.log(entry)
        self._step = entry["global_step"] + 1

    def stage(self, stage: str) -> None:
        """The scores and sample grid of a stage (`before`, `after-00`, ...), if it was evaluated; they stand at the step that comes next."""
        self._log_stage(stage, self._step, replayed=False)

    def finish(self) -> None:
        """The report, and the model that lies in the run folder."""
        if self._sinks:
            report = json.loads((self._folder / "report" / "report.json").read_text())
            for sink in self._sinks:
                sink.finish(self._step, report, self._folder / "model")

    def _log_stage(self, stage: str, step: int, replayed: bool) -> None:
        file = self._folder / "evaluation" / stage / "scores.json"
        sinks = [sink for sink in self._sinks if sink.shows and (sink.replays or not replayed)]
        if sinks and file.is_file():
            scores, picture = json.loads(file.read_text())["plain"], draw_stage(self._folder, stage)
            for sink in sinks:
                sink.stage(step, stage, scores, picture)


def stage_after(number: int) -> str:
    """The stage after concept `number`; -1 is before the first."""
    return "before" if number < 0 else f"after-{number:02d}"


def _asked_for(config: RunConfig) -> list[str]:
    return [name for name in OPTIONAL if getattr(config.track, name)]
