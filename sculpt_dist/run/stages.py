"""The stages of a run one by one: only prepare, only evaluate, only export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.files import make_folder
from sculpt_dist.engine.stopping.watch import watched
from sculpt_dist.evaluation.evaluator import check_evaluation, check_prompts, evaluate
from sculpt_dist.run.export_forms import Form
from sculpt_dist.run.folder import release_folder
from sculpt_dist.run.kinds import KINDS
from sculpt_dist.run.model import base_fingerprint, open_backbone
from sculpt_dist.run.session import open_session
from sculpt_dist.run.setup import resolve


def prepare_only(config: RunConfig) -> Path:
    """Draw and store the samples of every concept; returns the folder of the shards."""
    setup = resolve(config)
    group = setup.join_ranks()
    with open_session(setup, group, scores=False) as session:
        KINDS[setup.method.kind].runner(session).prepare()
    release_folder(session.folder)
    return session.folder / "data"


def evaluate_only(config: RunConfig, model: Path | None, output: Path | None) -> tuple[dict[str, Any], Path]:
    """Score a model folder on all concepts of the configuration; by default the export of the configuration's run."""
    setup = resolve(config)
    folder = setup.folder
    model = model or folder / "model"
    where = output or folder / "evaluation" / "model"
    check_evaluation(setup.evaluation)
    group = setup.join_ranks()
    group.on_first(lambda: make_folder(folder))
    with watched(group, folder, config.engine.grace) as stop:
        backbone = open_backbone(config.model, group, folder, model)
        base = group.on_first(lambda: base_fingerprint(backbone.folder))  # compares with the export
        group.together(lambda: check_prompts(setup.evaluation, backbone))
        evaluated = setup.evaluation, backbone, backbone.net, group, where, setup.concepts, model.name, stop
        scores = evaluate(*evaluated, base[:16])
    return scores, where


def export_only(config: RunConfig, form: str = "folder", output: Path | None = None, rank: int = 16) -> Path:
    """Write the model folder from the newest checkpoint of the configuration's run, and then another form of it.

    `form`: folder; single (one .safetensors file in the original layout, SD 1.x and SDXL); delta (the changed tensors
    alone, for `backbones.formats.delta.apply_delta`); lora, kohya (the best adapter of this `rank`, as diffusers and
    peft or as ComfyUI and A1111 read it, see `backbones.formats.adapter`). `output` names the file of all but a folder;
    by default it is written into the run folder.
    """
    wanted = Form(form, output, rank)
    wanted.check()
    setup = resolve(config)
    return KINDS[setup.method.kind].export(setup, wanted, setup.join_ranks())
