"""How each kind of method runs and is exported: `Method.kind` is a key of KINDS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from sculpt_dist.config.schema import ModelConfig
from sculpt_dist.engine.group import Group
from sculpt_dist.guards import GUARD
from sculpt_dist.run.editor import EditorRun
from sculpt_dist.run.export_forms import Form, export_edited, export_trained
from sculpt_dist.run.guarding import GuardRun, export_guarded
from sculpt_dist.run.session import Session
from sculpt_dist.run.setup import RunSetup
from sculpt_dist.run.trainer import Trainer


class Runner(Protocol):
    """A run of one kind of method. All ranks call every member."""

    def __init__(self, session: Session) -> None: ...

    def prepare(self) -> dict[str, str]:
        """Make what must exist before the method runs; returns the checksum of each index of samples."""
        ...

    def unlearn(self) -> Iterator[tuple[str, Tensor | None]]:
        """Forget all concepts, with scores before and after; yields the changed weights, whole on rank 0."""
        ...


@dataclass(frozen=True)
class Kind:
    """How one kind of method runs, and how its result is exported later."""

    runner: type[Runner]
    export: Callable[[RunSetup, Form, Group], Path]
    beside: str | None = None  # a subfolder of the run that goes into its model; the weights are then the base's

    def dtype(self, model: ModelConfig) -> str:
        """The dtype of the exported weights, see `export_model`."""
        return model.export_dtype or (model.dtype if self.beside is None else "source")


KINDS = {
    "trains": Kind(Trainer, export_trained),
    "edits": Kind(EditorRun, export_edited),
    "guards": Kind(GuardRun, export_guarded, GUARD),
}
