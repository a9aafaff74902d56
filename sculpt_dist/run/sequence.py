"""The whole run: prepare, then concept after concept with the model before it as the teacher, then export and report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sculpt_dist.config.load import check_batch, plain_values
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import text_sha256
from sculpt_dist.data.prompts import concept_prompts
from sculpt_dist.engine.checkpoints import restore as checkpoint
from sculpt_dist.engine.stopping.watch import watched
from sculpt_dist.evaluation.evaluator import check_evaluation, check_prompts
from sculpt_dist.methods.base import Editor
from sculpt_dist.run.build import base_fingerprint, build_backbone, build_engine, build_method, join_ranks
from sculpt_dist.run.costs import Costs
from sculpt_dist.run.export import export_model, write_card
from sculpt_dist.run.folder import (
    check_checkpoint,
    claim_folder,
    config_fingerprint,
    mark_finished,
    release_folder,
    write_manifest,
)
from sculpt_dist.run.preflight import check_model
from sculpt_dist.run.prepare import prepared
from sculpt_dist.run.train import make_plan
from sculpt_dist.run.trainer import Session, Trainer
from sculpt_dist.track.tracker import Tracker, check_tracking


@dataclass(frozen=True)
class Run:
    """A finished run: where everything is, and what the report says."""

    folder: Path
    report: dict[str, Any]

    @property
    def model(self) -> Path:
        """The unlearned model, a diffusers pipeline folder."""
        return self.folder / "model"


def run_sequence(config: RunConfig) -> Run:
    """Unlearn every concept of the configuration; called again, it goes on where it stopped.

    Every rank enters. Raises SculptError for what the user can mend, StopRequested after a saved stop.
    """
    if not config.concepts:
        raise ConfigError(
            "concepts is empty: name at least one, for example 'concepts=[{target: cat, superclass: animal}]'"
        )
    prompts = [concept_prompts(concept, config.prepare) for concept in config.concepts]
    method = build_method(config)
    plan = None if isinstance(method, Editor) else make_plan(config, method)
    check_tracking(config.track)
    evaluates = config.evaluate.enabled or (plan is not None and method.calibration_images > 0)
    if evaluates:
        check_evaluation(config)
    group = join_ranks(config)
    check_batch(config, group.size)
    folder = claim_folder(config, group)
    tracker = Tracker(config.track, plain_values(config), folder, group.is_first)
    with tracker, watched(group, folder, config.engine.grace) as stop:
        backbone = build_backbone(config, group)
        base = group.on_first(lambda: base_fingerprint(backbone.folder))
        group.on_first(lambda: check_model(config, backbone.folder))
        costs = Costs(folder, group, backbone)
        costs.read()
        if evaluates:
            group.together(lambda: check_prompts(config, backbone))
        shards: dict[str, str] = {}
        fingerprints = {"base": base, "config": config_fingerprint(config)}
        engine = found = None
        if plan is not None:
            found = checkpoint.newest(folder / "checkpoints", group)
            if found is not None:  # what does not fit is refused before anything is drawn or built
                check_checkpoint(*found, fingerprints, config)
            with costs.counting("prepare"):
                engine, shards = prepared(config, method, backbone, base, folder, group, stop)
        if group.is_first:
            write_manifest(folder, config, base, shards)
        session = Session(config, folder, group, backbone, costs, stop, tracker)
        if plan is None:
            weights = session.edit(method, prompts)
        else:
            fingerprints["data"] = text_sha256(json.dumps(shards))
            engine = engine or build_engine(config, method, backbone, group)
            weights = Trainer(session, engine, method, plan, fingerprints).unlearn_all(found)
        export_model(config, backbone, weights, folder / "model", group)
        costs.write()
        if group.is_first:
            from sculpt_dist.report.report import write_report

            mark_finished(folder)
            write_report(folder)
            write_card(folder)
        group.barrier()
        tracker.finish()  # may send the model for long; the other ranks are done
    release_folder(folder)
    return Run(folder, json.loads((folder / "report" / "report.json").read_text()))
