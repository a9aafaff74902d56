"""The whole run: prepare, unlearn concept after concept, export and report."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sculpt_dist.attacks.base import Attack
from sculpt_dist.backbones.base import Backbone
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.watch import watched
from sculpt_dist.evaluation.evaluator import check_evaluation
from sculpt_dist.report.report import read_report
from sculpt_dist.run.attacking import attack_model, cases_of, check_attacks, check_room, chosen_attacks
from sculpt_dist.run.export import export_model, write_report_and_card
from sculpt_dist.run.folder import mark_finished, release_folder, write_manifest
from sculpt_dist.run.kinds import KINDS
from sculpt_dist.run.model import open_backbone
from sculpt_dist.run.session import open_session
from sculpt_dist.run.setup import RunSetup, resolve
from sculpt_dist.track.tracker import check_tracking


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and the content of its report."""

    folder: Path
    report: dict[str, Any]

    @property
    def model(self) -> Path:
        """The unlearned model, a diffusers pipeline folder."""
        return self.folder / "model"


def run_sequence(config: RunConfig) -> Run:
    """Unlearn every concept of the configuration; a second call continues where the first stopped.

    All ranks call it. Raises SculptError for mistakes that the user can correct, and StopRequested after a saved stop.
    """
    setup = resolve(config)
    check_tracking(config.track)
    if setup.scores or config.evaluate.attacks:
        check_evaluation(setup.evaluation)
    if setup.scores:
        _ = setup.evaluation_between  # a subset that is too small is told now
    attacks = chosen_attacks(config, config.evaluate.attacks, has_run=True) if config.evaluate.attacks else {}
    if attacks:
        check_attacks(setup, attacks)
    group = setup.join_ranks()
    setup.micro_batch(group.size)
    folder = _unlearn(setup, attacks, group)
    try:
        if attacks:
            _attack(setup, attacks, group)
    finally:
        release_folder(folder)
    return Run(folder, read_report(folder))


def _attack(setup: RunSetup, attacks: Mapping[str, Attack], group: Group) -> None:
    """Attack the export, and tell of it in report and card. The session is closed."""
    config, folder = setup.config, setup.folder
    gc.collect()  # the net and the engine that trained: cycles keep them, and the attacked model comes beside them
    if group.device.type == "cuda":
        torch.cuda.empty_cache()
    with watched(group, folder, config.engine.grace) as stop:
        attack_model(setup, attacks, group, stop, None, None, folder / "attacks")
    backbone = open_backbone(config.model, group, folder)  # its parts load on first use, and none is used
    group.on_first(lambda: write_report_and_card(folder, backbone))


def _unlearn(setup: RunSetup, attacks: Mapping[str, Attack], group: Group) -> Path:
    """Prepare, train, export and report; returns the run folder, which stays locked.

    `attacks`: those to come, whose prompts are checked before the training.
    """
    config = setup.config
    with open_session(setup, group) as session:
        if attacks:
            group.together(lambda: check_room(session.backbone, attacks, cases_of(setup)))
        kind = KINDS[setup.method.kind]
        runner = kind.runner(session)
        shards = runner.prepare()
        group.on_first(lambda: write_manifest(session.folder, config, session.base, shards))
        weights = runner.unlearn()
        model, beside = session.folder / "model", session.folder / kind.beside if kind.beside else None
        export_model(kind.dtype(config.model), session.backbone, weights, model, group, beside)
        session.costs.write()
        group.on_first(lambda: _finish(session.folder, session.backbone))
        session.tracker.finish()  # uploading the model may take long; the other ranks are done
    return session.folder


def _finish(folder: Path, backbone: Backbone) -> None:
    mark_finished(folder)
    write_report_and_card(folder, backbone)
