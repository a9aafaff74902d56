"""The stages of a run one by one: only prepare, only evaluate, only export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.formats.adapter import FORMS as ADAPTERS
from sculpt_dist.backbones.formats.adapter import WEIGHT_NAME, check_adapter, write_adapter, write_adapter_of
from sculpt_dist.backbones.formats.original import check_single_file
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError, RunFolderError
from sculpt_dist.engine.checkpoints import restore as checkpoint
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.watch import watched
from sculpt_dist.evaluation.evaluator import check_evaluation, check_prompts, evaluate
from sculpt_dist.methods.base import Editor
from sculpt_dist.run.build import base_fingerprint, build_backbone, build_engine, build_method, join_ranks
from sculpt_dist.run.export import export_model, write_card
from sculpt_dist.run.folder import check_checkpoint, claim_folder, config_fingerprint, release_folder
from sculpt_dist.run.prepare import prepared


def prepare_only(config: RunConfig) -> Path:
    """Draw and store the samples of every concept; returns the folder of the shards."""
    method = build_method(config)
    group = join_ranks(config)
    folder = claim_folder(config, group)
    with watched(group, folder, config.engine.grace) as stop:
        backbone = build_backbone(config, group)
        base = group.on_first(lambda: base_fingerprint(backbone.folder))
        if not isinstance(method, Editor):
            prepared(config, method, backbone, base, folder, group, stop)
    release_folder(folder)
    return folder / "data"


def evaluate_only(config: RunConfig, model: Path | None, output: Path | None) -> tuple[dict[str, Any], Path]:
    """Score a model folder (default: the export of the configuration's run) on all concepts of the configuration."""
    folder = Path(config.run.folder)
    model = model or folder / "model"
    where = output or folder / "evaluation" / "model"
    check_evaluation(config)
    group = join_ranks(config)
    group.on_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    with watched(group, folder, config.engine.grace) as stop:
        backbone = build_backbone(config, group, path=str(model))
        group.on_first(
            lambda: base_fingerprint(backbone.folder)
        )  # checks the weights against the checksums of the export
        group.together(lambda: check_prompts(config, backbone))
        scores = evaluate(config, backbone, backbone.net, group, where, config.concepts, model.name, stop)
    return scores, where


def export_only(config: RunConfig, form: str = "folder", output: Path | None = None, rank: int = 16) -> Path:
    """Write the model folder from the newest checkpoint of the configuration's run, and then another form of it.

    `form`: folder; single (one .safetensors file in the original layout, SD 1.x and SDXL); delta (the changed tensors alone, for
    `backbones.shared.delta.apply_delta`); lora, kohya (the best adapter of this `rank`, as diffusers and peft or as ComfyUI and A1111
    read it, see `backbones.shared.adapter`). `output` names the file of all but a folder; by default it lies in the run folder.
    """
    if form not in FORMS or (form == "folder" and output is not None):
        raise ConfigError(
            f"--as {form}, --output {output}: choose one of {', '.join(FORMS)}; --output names the file of all but a folder"
        )
    if rank < 1:
        raise ConfigError(f"--rank {rank}: an adapter has a rank of 1 or more")
    method = build_method(config)
    group = join_ranks(config)
    if isinstance(method, Editor):
        return _export_edited(config, form, output, rank, group)
    found = checkpoint.newest(Path(config.run.folder) / "checkpoints", group)
    if found is None:
        raise RunFolderError(f"{config.run.folder}: has no checkpoint yet; run unlearn first")
    folder = claim_folder(config, group)
    backbone = build_backbone(config, group)
    base = group.on_first(lambda: base_fingerprint(backbone.folder))
    check_checkpoint(*found, {"base": base, "config": config_fingerprint(config)}, config)
    if form == "single":
        group.on_first(lambda: check_single_file(backbone.folder, output))
    if form in ADAPTERS:
        adapter = output or folder / DEFAULTS[form]
        group.on_first(lambda: check_adapter(backbone.folder, form, rank, adapter))
    engine = build_engine(config, method, backbone, group)
    checkpoint.load(found[0], engine.shards, [])
    engine.publish()
    model = export_model(config, backbone, engine.full_weights(), folder / "model", group)
    if group.is_first and (folder / "report" / "report.json").is_file():
        write_card(folder)
    if form in ADAPTERS:
        group.together(lambda: _write_adapter(backbone, engine.full_weights(), adapter, form, rank, group))
        written = adapter
    else:
        written = group.on_first(lambda: _in_form(form, backbone.folder, model, output))
    release_folder(folder)
    return written


DEFAULTS = {  # the file of each form, in the run folder
    "single": "model.safetensors",
    "delta": "delta.safetensors",
    "lora": f"lora/{WEIGHT_NAME}",
    "kohya": "kohya.safetensors",
}
FORMS = ("folder", *DEFAULTS)


def _export_edited(config: RunConfig, form: str, output: Path | None, rank: int, group: Group) -> Path:
    """A closed form has no checkpoint; its model folder, which the run wrote, is whole."""
    model = Path(config.run.folder) / "model"
    if not (model / "model_index.json").is_file():
        raise RunFolderError(f"{config.run.folder}: has no model yet; run unlearn first")
    folder = claim_folder(config, group)
    base = build_backbone(config, group).folder
    file = output or folder / DEFAULTS.get(form, model.name)

    def write() -> None:
        if form in ADAPTERS:
            write_adapter(base, model, file, form, rank)
        else:
            _in_form(form, base, model, output)

    group.on_first(write)
    release_folder(folder)
    return file


def _in_form(form: str, base: Path, model: Path, output: Path | None) -> Path:
    """The exported folder in another form, beside it or at `output`."""
    from sculpt_dist.backbones.formats.delta import write_delta
    from sculpt_dist.backbones.formats.original import write_single_file

    if form == "folder":
        return model
    output = output or model.with_name(DEFAULTS[form])
    if form == "single":
        write_single_file(model, output)
    else:
        write_delta(base, model, output)
    return output


def _write_adapter(
    backbone: Backbone, weights: Iterator[tuple[str, Tensor | None]], file: Path, form: str, rank: int, group: Group
) -> None:
    """All ranks enter, the first writes. Not from the exported folder: its `model.dtype` may have rounded small changes away."""
    try:
        if group.is_first:
            write_adapter_of(backbone.folder, backbone.merged(weights), file, form, rank)
    finally:
        for _ in weights:  # each is summed over all ranks, who would wait for one that stops early
            pass
