"""TensorBoard: event files in RUN/tensorboard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sculpt_dist.config.schema import TrackConfig
from sculpt_dist.track.sinks import base

if TYPE_CHECKING:
    from PIL.Image import Image


class Sink(base.Sink):
    package, install = "tensorboard", "pip install 'sculpt-dist[tensorboard]'"

    def __init__(self, track: TrackConfig, values: Mapping[str, Any], folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._values = values
        # TensorBoard drops events from purge_step on: those steps are repeated.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)

    def log(self, entry: Mapping[str, Any]) -> None:
        for name, value in base.numbers(entry).items():
            self._writer.add_scalar(name, value, entry["global_step"])

    def stage(self, step: int, stage: str, scores: Mapping[str, Any], picture: Image | None) -> None:
        import numpy as np

        for name, value in base.score_numbers(scores).items():
            self._writer.add_scalar(name, value, step)
        if picture is not None:
            self._writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")

    def finish(self, step: int, report: Mapping[str, Any], model: Path) -> None:
        """Record the settings beside the final scores, which the last stage already recorded."""
        from torch.utils.tensorboard.summary import hparams

        final = base.score_numbers(report["after"])
        events: Any = self._writer.file_writer
        for summary in hparams(base.settings(self._values), final):
            events.add_summary(summary)

    def close(self, outcome: str) -> None:
        self._writer.close()
