"""A run of a guard: fitted on one rank, written, and put on the net by all of them; the weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sculpt_dist.core.errors import ConfigError, ModelError, NonFiniteError, RunFolderError
from sculpt_dist.engine.group import Group
from sculpt_dist.guards import GUARD, Fitting, Guard, guard_backbone, read_guard, write_guard
from sculpt_dist.run.export_forms import Form
from sculpt_dist.run.session import Session
from sculpt_dist.run.setup import RunSetup
from sculpt_dist.track.tracker import stage_after


class GuardRun:
    """Runs a `Guard`. RUN/guard holds what was fitted; a second call takes it from there."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def prepare(self) -> dict[str, str]:
        """A guard that needs images draws them while it is fitted."""
        return {}

    def unlearn(self) -> Iterator[tuple[str, Tensor | None]]:
        """Fit the guard and put it on the net, with scores before and after; no weight changes."""
        session, setup = self.session, self.session.setup
        net, concepts = session.backbone.net, setup.concepts
        session.tracker.start()
        session.score(lambda: nullcontext(net), "before", concepts)
        folder = self.fit()
        guard_backbone(session.backbone, folder)
        total = sum(parameter.numel() for parameter in net.parameters())
        session.costs.weights = {"total": total, "trained": 0, "open": 0}
        session.score(lambda: nullcontext(net), stage_after(len(concepts) - 1), concepts)
        return iter(())

    def fit(self) -> Path:
        """Fit the guard on the first rank, unless it is there; returns its folder."""
        session, folder = self.session, self.session.folder / GUARD

        def work() -> int:
            passes = _passes_of(session, folder)
            return _fit(session, folder) if passes is None else passes

        with session.costs.counting("train"):
            passes = session.group.on_first(work)
        session.costs.set_passes("train", passes)
        return folder


def _fit(session: Session, folder: Path) -> int:
    """Fit the guard and write it; returns the passes that it took."""
    setup, backbone = session.setup, session.backbone
    guard, config = setup.method, setup.config
    assert isinstance(guard, Guard)
    before = backbone.passes
    with torch.no_grad(), backbone.temporary_embeddings():
        tensors = guard.fit(Fitting(backbone, setup.prompts, config.prepare, config.train.seed))
    for name, tensor in tensors.items():
        if bool(tensor.isnan().any()):
            raise NonFiniteError(f"method.name={setup.method_name}: what it fitted is not finite ({name})")
    about = {**_made_by(session), "passes": backbone.passes - before}
    write_guard(folder, guard, tensors, backbone.net, about)
    return backbone.passes - before


def _passes_of(session: Session, folder: Path) -> int | None:
    """The passes that made the guard of this run; None where it is not there, or was made by other settings."""
    try:
        about = read_guard(folder).about
    except (ModelError, ConfigError):
        return None
    same = all(about.get(name) == value for name, value in _made_by(session).items())
    return int(about["passes"]) if same else None


def _made_by(session: Session) -> dict[str, Any]:
    setup = session.setup
    targets = [concept.target for concept in setup.concepts]
    return {"base": session.base, "config": setup.fingerprint, "targets": targets}


def export_guarded(setup: RunSetup, form: Form, group: Group) -> Path:
    """The model folder of a run; a guard changes no weight, so there is no other form."""
    if form.name != "folder":
        raise ConfigError(
            f"--as {form.name}: {setup.method_name} is a guard and changes no weight, so there is only the model "
            f"folder, with the guard in its subfolder {GUARD}"
        )
    model = setup.folder / "model"
    if not (model / GUARD).is_dir():
        raise RunFolderError(f"{setup.folder}: has no model with a guard yet; run unlearn first")
    return model
