"""The stages of a run one by one: only prepare, only evaluate, only export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sculpt_dist import build
from sculpt_dist.config import RunConfig
from sculpt_dist.engine import checkpoint
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping import StopRequest
from sculpt_dist.errors import RunFolderError
from sculpt_dist.evaluate import evaluate
from sculpt_dist.export import export, write_card
from sculpt_dist.prepare import prepare


def prepare_only(config: RunConfig) -> Path:
    """Draw and store the samples of every concept; returns the folder of the shards."""
    build.build_method(config)
    group = Group(config.engine.timeout)
    folder = build.claim_folder(config, group)
    backbone = build.build_backbone(config, group)
    base = group.from_first(build.base_fingerprint(backbone.folder) if group.is_first else "")
    with StopRequest(group) as stop:
        prepare(config, backbone, base, folder, group, stop)
    build.release_folder(folder)
    return folder / "data"


def evaluate_only(config: RunConfig, model: Path | None, output: Path | None) -> tuple[dict[str, Any], Path]:
    """Score a model folder (default: the export of the configuration's run) on all concepts of the configuration."""
    folder = Path(config.run.folder)
    model = model or folder / "model"
    where = output or folder / "evaluation" / "model"
    group = Group(config.engine.timeout)
    backbone = build.build_backbone(config, group, path=str(model))
    with StopRequest(group) as stop:
        scores = evaluate(config, backbone, backbone.net, group, where, config.concepts, model.name, stop)
    return scores, where


def export_only(config: RunConfig) -> Path:
    """Write the model folder from the newest checkpoint of the configuration's run."""
    method = build.build_method(config)
    group = Group(config.engine.timeout)
    found = checkpoint.newest(Path(config.run.folder) / "checkpoints", group)
    if found is None:
        raise RunFolderError(f"{config.run.folder}: has no checkpoint yet; run unlearn first")
    folder = build.claim_folder(config, group)
    backbone = build.build_backbone(config, group)
    base = group.from_first(build.base_fingerprint(backbone.folder) if group.is_first else "")
    build.check_checkpoint(*found, {"base": base, "config": build.config_fingerprint(config)})
    engine = build.build_engine(config, method, backbone, group)
    checkpoint.load(found[0], engine.shards, [])
    engine.publish()
    model = export(config, backbone, engine.full_weights(), folder / "model", group)
    if group.is_first and (folder / "report" / "report.json").is_file():
        write_card(folder)
    build.release_folder(folder)
    return model
