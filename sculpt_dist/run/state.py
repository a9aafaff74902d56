"""The state that a checkpoint of a training run contains, and how a run resumes from it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sculpt_dist.core.files import append_line, by_number
from sculpt_dist.engine import checkpoints
from sculpt_dist.engine.checkpoints.save import Saver
from sculpt_dist.engine.stopping.request import LOG_FILE
from sculpt_dist.engine.zero import Engine
from sculpt_dist.run.folder import code_versions, finished_concepts, named_finished
from sculpt_dist.run.session import Session
from sculpt_dist.run.setup import RunSetup
from sculpt_dist.run.training_loop import ConceptRun, LossWindow
from sculpt_dist.track.tracker import stage_after

Found = tuple[Path, dict[str, Any]]  # a checkpoint and its state


def find_checkpoint(session: Session) -> Found | None:
    """The newest checkpoint of the run folder.

    Raises RunFolderError where it belongs to another base or configuration.
    """
    found = checkpoints.newest(session.folder / "checkpoints", session.group)
    if found is not None:
        fingerprints = {"base": session.base, "config": session.setup.fingerprint}
        session.setup.check_checkpoint(*found, fingerprints)
    return found


@dataclass
class TrainingState:
    """Saves the state of a run, within concepts and between them, and restores it."""

    session: Session
    engine: Engine
    saver: Saver
    fingerprints: dict[str, str]  # of what a checkpoint must belong to
    passes_before: int | None = 0  # of all concepts before the present one; None: a checkpoint did not record them

    def save(self, run: ConceptRun) -> None:
        """A checkpoint within a concept."""
        extra: dict[str, list[Tensor]] = {"teacher": run.start}
        if run.candidate is not None:
            extra["candidate"] = run.candidate
        state = {
            "updates": self.engine.optimizer.updates,
            "mask": masking(self.session.setup),
            "births": self.engine.mask.births,
            "selections": self.engine.mask.selections,
            "open_count": self.engine.mask.open_count,
            "recent": asdict(run.recent),
            "candidate": run.candidate is not None,
            "trajectories": [trajectory.index for trajectory in run.trajectories],
        }
        companion = run.method.companion
        beside = companion.state() if companion is not None and self.session.group.is_first else {}
        named = {f"companion|{name}|0": tensor for name, tensor in beside.items()}
        self._write((run.number, run.step), extra, state, _trajectory_tensors(run) | named)

    def save_between(self, finished: int) -> None:
        """A checkpoint between two concepts, where only the weights matter."""
        self.passes_before = self.session.costs.all_passes("train")
        self._write((finished, 0), {}, {"candidate": False}, {})

    def _write(
        self,
        place: tuple[int, int],
        extra: dict[str, list[Tensor]],
        state: dict[str, Any],
        named: Mapping[str, Tensor],
    ) -> None:
        self.engine.check_weights()
        (concept, step), setup = place, self.session.setup
        num_finished = setup.trained_with(concept).start if step else concept
        finished = finished_concepts([done.target for done in setup.concepts[:num_finished]])
        about = {"concept": concept, "step": step, **finished, "code": code_versions()}
        # replicas are written once
        held = self.engine.shards if self.session.group.is_first or not self.engine.replicated else []
        about["passes"] = {"train": self.session.costs.all_passes("train"), "before": self.passes_before}
        self.saver.save(place, held, extra, about | state | self.fingerprints, named)
        self.session.costs.write()

    def resume(self, found: Found | None) -> tuple[int, dict[str, Any] | None]:
        """Load the weights from before the concept that the run resumes.

        Returns the concept's number and its saved state, which is None if the concept starts from its first step.
        """
        if found is None:
            self.session.costs.set_passes("train", 0)
            return 0, None
        (path, state), session = found, self.session
        changed = session.setup.check_checkpoint(path, state, self.fingerprints)
        session.group.on_first(lambda: self._clear_later(path, state["concept"] if changed else None))
        if changed:
            session.read_passes()
        within, mask = state["step"] > 0, masking(session.setup)
        restarts = within and state.get("mask", mask) != mask
        if session.group.is_first:
            log, finished = session.folder / LOG_FILE, named_finished(state) or "no concept"
            append_line(log, f"resumes from {path.name}, {finished} finished")
            if restarts:
                append_line(log, "restarts this concept, because the mask's settings have changed")
        passes = state.get("passes", {})  # not in checkpoints of earlier versions
        self.passes_before = passes.get("before" if within else "train")
        session.costs.set_passes("train", self.passes_before if restarts else passes.get("train"))
        extra = ["teacher"] if within else []
        filled = session.group.together(lambda: checkpoints.load(path, self.engine.shards, extra))
        if within:
            self.engine.set_masters(filled["teacher"])
        else:
            self.engine.publish()
        return state["concept"], state | {"path": str(path)} if within and not restarts else None

    def _clear_later(self, path: Path, concept: int | None) -> None:
        """Put damaged later checkpoints aside; with a `concept`, also remove the scores from it on."""
        checkpoints.set_aside_later(path)
        for scored in (self.session.folder / "evaluation").glob("after-*") if concept is not None else ():
            if by_number(scored) >= by_number(Path(stage_after(concept or 0))):
                shutil.rmtree(scored)

    def restore(self, run: ConceptRun, state: dict[str, Any]) -> None:
        """Restore weights, moments, saliency, mask and trajectories of the saved step; the teacher exists already."""
        path = Path(state["path"])
        filled = checkpoints.load(path, self.engine.shards, ["candidate"] if state["candidate"] else [])
        self.engine.publish()
        run.step, run.recent = state["step"], LossWindow(**state["recent"])
        run.candidate = filled.get("candidate")
        self._restore_trajectories(run, path, state["trajectories"])
        if run.method.companion is not None:
            run.method.companion.restore(checkpoints.load_named(path, "companion"))
        self.engine.optimizer.updates = state["updates"]
        mask = self.engine.mask
        mask.births, mask.selections, mask.open_count = state["births"], state["selections"], state["open_count"]

    def _restore_trajectories(self, run: ConceptRun, path: Path, indices: list[int]) -> None:
        latents, prompts = (checkpoints.load_named(path, kind) for kind in ("trajectory", "trajectory_prompt"))
        backbone, device = self.session.backbone, self.session.group.device
        for micro, trajectory in enumerate(run.trajectories if prompts else []):
            places = [str(position) for position in run.streams.layout.positions(micro)]
            if micro >= len(indices) or not latents.keys() >= set(places):
                continue  # another batch or accumulation, accepted with run.override: start a new trajectory
            stacked = torch.stack([latents[place].view(backbone.latent_shape) for place in places])  # [B, C, H, W]
            trajectory.latents, trajectory.index = stacked.to(device), indices[micro]
            trajectory.prompts = tuple(bytes(prompts[place].tolist()).decode() for place in places)


def masking(setup: RunSetup) -> dict[str, Any]:
    """The settings on which a saved mask and its saliency depend."""
    mask, (_, plan) = setup.config.mask, setup.trained
    return {"keep": mask.keep, "scope": mask.scope, "saliency": mask.saliency, "collect": plan.collect}


def _trajectory_tensors(run: ConceptRun) -> dict[str, Tensor]:
    """This rank's trajectories: one flat tensor for each position of the global batch."""
    kept = {}
    for micro, trajectory in enumerate(run.trajectories):
        latents: list[Tensor] = [] if trajectory.latents is None else list(trajectory.latents)
        for position, latent, prompt in zip(run.streams.layout.positions(micro), latents, trajectory.prompts):
            kept[f"trajectory|{position}|0"] = latent.flatten()
            kept[f"trajectory_prompt|{position}|0"] = torch.tensor(list(prompt.encode()), dtype=torch.uint8)
    return kept
