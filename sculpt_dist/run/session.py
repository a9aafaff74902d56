"""A session: one process's part in a run, from start to end or stop. Every kind of method works with it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.io.folders import unloaded_files
from sculpt_dist.config.load import plain_values
from sculpt_dist.config.schema import Concept
from sculpt_dist.core.files import read_object, text_sha256
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.request import StopRequest
from sculpt_dist.engine.stopping.watch import watched
from sculpt_dist.evaluation.evaluator import check_prompts, evaluate
from sculpt_dist.evaluation.requests import Evaluation
from sculpt_dist.run.costs import Costs
from sculpt_dist.run.folder import claim_folder, release_folder
from sculpt_dist.run.model import base_fingerprint, open_backbone
from sculpt_dist.run.preflight import check_model
from sculpt_dist.run.setup import RunSetup
from sculpt_dist.run.store import Store
from sculpt_dist.track.tracker import Tracker, stage_after

Drawing = Callable[[], AbstractContextManager[nn.Module]]  # opens the net to draw with
STAGE = re.compile(r"before$|after-\d+$")


@dataclass
class Session:
    """The open run folder, the ranks, the base model, and where costs and metrics go."""

    setup: RunSetup
    folder: Path
    group: Group
    backbone: Backbone
    base: str  # checksum of the base model
    costs: Costs
    stop: StopRequest
    tracker: Tracker
    passes: dict[str, int | None] = field(default_factory=dict)  # of each scored stage; None: of an earlier version

    @property
    def store(self) -> Store:
        """What this run shares with others."""
        folder = self.setup.config.prepare.folder
        return Store(None if folder is None else Path(folder), self.group, self.stop)

    def score(self, drawing: Drawing, stage: str, concepts: Sequence[Concept]) -> None:
        """Score the present weights, unless evaluation is off or their scores are on disk, made by these settings."""
        where = self.folder / "evaluation" / stage
        lacking = self.group.on_first(lambda: self._lacks_scores(where))
        if lacking:
            if stage == "before":
                self._score_base(drawing, where, concepts)
            else:
                self._score(drawing, where, concepts)
            self.passes[stage] = self.group.on_first(lambda: _read_scores(where / "scores.json").get("passes"))
            self._count_passes()
            self.costs.write()
        self.tracker.stage(stage)

    def _score_base(self, drawing: Drawing, where: Path, concepts: Sequence[Concept]) -> None:
        """The base's scores are the same in all runs with these settings, whatever their method."""
        settings, store = self.setup.config.evaluate, self.store
        key = [
            *(self.base, self.setup.evaluation.fingerprint, settings.keep_images, settings.batch),
            *(str(next(self.backbone.net.parameters()).dtype), *self.backbone.frozen_dtypes),
            *(self.backbone.image_size, list(self.backbone.size_ids or ())),
            [asdict(concept) for concept in concepts],
        ]
        with store.held("scores", key):
            if not store.take("scores", key, where):
                self._score(drawing, where, concepts)
                store.keep("scores", key, where)

    def _score(self, drawing: Drawing, where: Path, concepts: Sequence[Concept]) -> None:
        # a compiled net would be compiled again for the shapes of these batches
        with self.costs.counting("evaluate"), torch.compiler.set_stance("force_eager"):
            stage, evaluation = where.name, self._evaluation(where.name)
            made_by = [self.base, *([] if stage == "before" else [self.setup.fingerprint, stage])]
            model = text_sha256(" ".join(made_by))[:16]
            with drawing() as net:
                evaluate(evaluation, self.backbone, net, self.group, where, concepts, stage, self.stop, model)

    def _evaluation(self, stage: str) -> Evaluation:
        """What is drawn at a stage: all images of the base and at the end, `evaluate.subset` of them in between."""
        is_between = stage not in ("before", stage_after(len(self.setup.concepts) - 1))
        return self.setup.evaluation_between if is_between else self.setup.evaluation

    def read_passes(self) -> None:
        """Count the passes of all stages that are scored."""

        def read() -> dict[str, int | None]:
            stages = (path for path in (self.folder / "evaluation").glob("*") if STAGE.match(path.name))
            files = {path.name: path / "scores.json" for path in stages}
            return {stage: _read_scores(file).get("passes") for stage, file in files.items() if file.exists()}

        self.passes = self.group.on_first(read)
        self._count_passes()

    def _count_passes(self) -> None:
        counts = self.passes.values()
        self.costs.set_passes("evaluate", None if None in counts else sum(count or 0 for count in counts))

    def _lacks_scores(self, stage: Path) -> bool:
        """Whether a stage is to be scored. Scores that were made by other settings are removed."""
        if not self.setup.config.evaluate.enabled:
            return False
        file, evaluation = stage / "scores.json", self._evaluation(stage.name)
        if not file.exists():
            return True
        plain = _read_scores(file)["plain"]
        wanted = {"made_by": evaluation.fingerprint, "subset": evaluation.most}
        earlier = {**wanted, "subset": None}  # what versions that did not write them drew
        found = {name: plain.get(name, value) for name, value in earlier.items()} if isinstance(plain, dict) else None
        if found != wanted:
            shutil.rmtree(stage)
        return found != wanted


def _read_scores(file: Path) -> dict[str, Any]:
    return read_object(file, f"remove {file.parent}, which is then scored again", ("plain",))


def _name_unloaded(folder: Path) -> None:
    strays = [file for part in sorted(folder.iterdir()) if part.is_dir() for file in unloaded_files(part)]
    if strays:
        named = ", ".join(str(file.relative_to(folder)) for file in strays[:5])
        print(f"{folder}: {named}: no weights by their names, so neither loaded nor exported", flush=True)


@contextmanager
def open_session(setup: RunSetup, group: Group, scores: bool = True) -> Iterator[Session]:
    """Claim the run folder, listen for requests to stop, open the tracker and the base model, and check that they fit.

    `scores`: whether the session will draw the images of the evaluation, whose prompts are then checked, too.
    """
    config = setup.config
    folder = claim_folder(config, group)
    try:
        with _session_in(folder, setup, group, scores) as session:
            yield session
    except BaseException:
        release_folder(folder)  # for another call in this process
        raise


@contextmanager
def _session_in(folder: Path, setup: RunSetup, group: Group, scores: bool) -> Iterator[Session]:
    config = setup.config
    with (
        Tracker(config.track, plain_values(config), folder, group.is_first) as tracker,
        watched(group, folder, config.engine.grace) as stop,
    ):
        backbone = open_backbone(config.model, group, folder)
        base = group.on_first(lambda: base_fingerprint(backbone.folder))
        group.on_first(lambda: check_model(config.model, backbone.folder))
        if group.is_first:
            _name_unloaded(backbone.folder)
        costs = Costs(folder, group, backbone)
        costs.read()
        if scores and setup.scores:
            group.together(lambda: check_prompts(setup.evaluation, backbone))
        session = Session(setup, folder, group, backbone, base, costs, stop, tracker)
        session.read_passes()
        yield session
