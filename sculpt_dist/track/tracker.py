"""The trackers of a run: metrics.jsonl always, others on request."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import TracebackType
from typing import Any

from sculpt_dist.config.schema import TrackConfig
from sculpt_dist.core.errors import ConfigError, StopRequested
from sculpt_dist.core.files import read_object
from sculpt_dist.core.plugins import plugin
from sculpt_dist.report.report import draw_stage, read_report
from sculpt_dist.track.sinks.base import DONE, FAILED, STOPPED, Sink
from sculpt_dist.track.sinks.jsonl import truncate_metrics


def requested_sinks(track: TrackConfig) -> list[str]:
    """Names of the trackers besides metrics.jsonl: those with a switch of their own, then `track.sinks`."""
    switches = {"wandb": track.wandb, "tensorboard": track.tensorboard}
    return list(dict.fromkeys([*(name for name, is_on in switches.items() if is_on), *track.sinks]))


def check_tracking(track: TrackConfig) -> None:
    """Raises ConfigError for an unknown tracker, and for one whose package is not installed."""
    for name in requested_sinks(track):
        sink = _sink_class(name)
        if sink.package is None:
            continue
        try:
            distribution(sink.package)
        except PackageNotFoundError:
            key, remedy = f"track.sinks={track.sinks}", f"remove {name} from track.sinks"
            if name not in track.sinks:
                key, remedy = f"track.{name}=true", f"set track.{name}=false"
            raise ConfigError(
                f"{key}: the package {sink.package} is not installed: run {sink.install}, or {remedy}"
            ) from None


class Tracker:
    """The trackers of a run on the first rank; on other ranks every call does nothing. A `with` block closes them.

    metrics.jsonl is the source of truth and holds every step once. A resumed run removes the lines of the steps that it
    will repeat. It sends the remaining lines to every tracker with `Sink.replays`, so that a kill leaves no gap there.
    """

    def __init__(self, track: TrackConfig, values: Mapping[str, Any], folder: Path, active: bool) -> None:
        """`values`: the whole configuration as plain dicts and lists. `active`: whether this is the first rank."""
        self._track, self._values, self._folder, self._active = track, values, folder, active
        self._sinks: list[Sink] = []
        self._step = 0  # the next one

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close(DONE if kind is None else STOPPED if kind is StopRequested else FAILED)

    def start(self, concept: int = 0, step: int = 0, global_step: int = 0) -> None:
        """Open the trackers at `step` of `concept`, where the run starts or resumes; `global_step` counts them all."""
        if not self._active:
            return
        lines = truncate_metrics(self._folder / "metrics.jsonl", (concept, step))
        self._step = global_step
        for name in dict.fromkeys(["jsonl", *requested_sinks(self._track)]):
            self._sinks.append(_sink_class(name)(self._track, self._values, self._folder, self._step))
        previous = None
        for line in lines:
            if line["concept"] != previous:
                stage = "before" if previous is None else stage_after(line["concept"] - 1)
                self._log_stage(stage, line["global_step"], replayed=True)
                previous = line["concept"]
            for sink in self._sinks:
                if sink.replays:
                    sink.log(line)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Record one step."""
        for sink in self._sinks:
            sink.log(entry)
        self._step = entry["global_step"] + 1

    def stage(self, stage: str) -> None:
        """Record the scores and sample grid of an evaluated stage (`before`, `after-00`, ...) at the next step."""
        self._log_stage(stage, self._step, replayed=False)

    def finish(self) -> None:
        """Record the report and the model of the run folder."""
        if self._sinks:
            report = read_report(self._folder)
            for sink in self._sinks:
                sink.finish(self._step, report, self._folder / "model")

    def _log_stage(self, stage: str, step: int, replayed: bool) -> None:
        file = self._folder / "evaluation" / stage / "scores.json"
        sinks = [sink for sink in self._sinks if sink.shows and (sink.replays or not replayed)]
        if sinks and file.is_file():
            content = read_object(file, f"remove {file.parent}, which is then scored again", ("plain",))
            scores = {**(content["plain"] or {}), "paraphrased": content.get("paraphrased")}
            picture = draw_stage(self._folder, stage, [concept["target"] for concept in self._values["concepts"]])
            for sink in sinks:
                sink.stage(step, stage, scores, picture)


def stage_after(number: int) -> str:
    """The stage after concept `number`; -1 is the stage before the first."""
    return "before" if number < 0 else f"after-{number:02d}"


def _sink_class(name: str) -> type[Sink]:
    found: type[Sink] = plugin("sculpt_dist.track.sinks", name, "track.sinks").Sink
    return found
