"""A finished or unfinished run, written in one of the forms that other programs read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.formats.about import About
from sculpt_dist.backbones.formats.adapter import FORMS as ADAPTERS
from sculpt_dist.backbones.formats.adapter import WEIGHT_NAME, check_adapter, read_lost, write_adapter, write_adapter_of
from sculpt_dist.backbones.formats.original import check_single_file
from sculpt_dist.config.load import plain_values
from sculpt_dist.core.errors import ConfigError, RunFolderError
from sculpt_dist.engine import checkpoints
from sculpt_dist.engine.group import Group
from sculpt_dist.run.build import build_engine, refine
from sculpt_dist.run.export import export_model, write_card
from sculpt_dist.run.folder import claim_folder, release_folder
from sculpt_dist.run.model import base_fingerprint, open_backbone
from sculpt_dist.run.owned import make_room_for_file, record_file
from sculpt_dist.run.setup import RunSetup

FILES = {  # the file of each form, in the run folder
    "single": "model.safetensors",
    "delta": "delta.safetensors",
    "lora": f"lora/{WEIGHT_NAME}",
    "kohya": "kohya.safetensors",
}
FORMS = ("folder", *FILES)


@dataclass(frozen=True)
class Form:
    """What to write: `name` is one of FORMS; `output` the file (None: in the run folder); `rank` that of an adapter."""

    name: str = "folder"
    output: Path | None = None
    rank: int = 16

    def check(self) -> None:
        """Raises ConfigError for an unknown form, and for options that do not go with it."""
        if self.name not in FORMS or (self.name == "folder" and self.output is not None):
            raise ConfigError(
                f"--as {self.name}, --output {self.output}: choose one of {', '.join(FORMS)}; --output names the file "
                "of all but a folder"
            )
        if self.rank < 1:
            raise ConfigError(f"--rank {self.rank}: an adapter has a rank of 1 or more")

    def file(self, run: Path) -> Path:
        """Where the form goes."""
        return self.output or run / FILES.get(self.name, "model")


def export_trained(setup: RunSetup, form: Form, group: Group) -> Path:
    """Write the model folder from the newest checkpoint, and then `form` of it. Raises RunFolderError without one."""
    found = checkpoints.newest(setup.folder / "checkpoints", group)
    if found is None:
        raise RunFolderError(f"{setup.folder}: has no checkpoint yet; run unlearn first")
    folder = claim_folder(setup.config, group)
    backbone = open_backbone(setup.config.model, group, folder)
    base = group.on_first(lambda: base_fingerprint(backbone.folder))
    setup.check_checkpoint(*found, {"base": base, "config": setup.fingerprint})
    if form.name == "single":
        group.on_first(lambda: check_single_file(backbone.folder, form.output))
    if form.name in ADAPTERS:
        group.on_first(lambda: check_adapter(backbone.folder, form.name, form.rank, form.file(folder)))
    engine = build_engine(setup, backbone, group)
    checkpoints.load(found[0], engine.shards, [])
    engine.publish()
    refine(setup, backbone, engine)
    dtype = setup.config.model.export_dtype or setup.config.model.dtype
    names = backbone.in_stored_order(engine.sizes)
    model = export_model(dtype, backbone, engine.full_weights(names), folder / "model", group)
    if group.is_first:
        write_card(folder, backbone)
    if form.name in ADAPTERS:
        written = form.file(folder)
        about = about_result(setup, backbone)
        group.on_first(lambda: make_room_for_file(folder, written))
        group.together(lambda: _write_adapter(backbone, engine.full_weights(names), written, form, about, group))
        group.on_first(lambda: _describe_lora(form, folder, backbone))
        group.on_first(lambda: record_file(folder, written))
    else:
        written = group.on_first(lambda: _write_form(form, backbone.folder, model, about_result(setup, backbone)))
    release_folder(folder)
    return written


def export_edited(setup: RunSetup, form: Form, group: Group) -> Path:
    """A closed form has no checkpoint: `form` is made from the model folder that the run wrote."""
    model = setup.folder / "model"
    if not (model / "model_index.json").is_file():
        raise RunFolderError(f"{setup.folder}: has no model yet; run unlearn first")
    folder = claim_folder(setup.config, group)
    backbone, file = open_backbone(setup.config.model, group, folder), form.file(folder)

    def write() -> None:
        about = about_result(setup, backbone)
        if form.name in ADAPTERS:
            make_room_for_file(folder, file)
            write_adapter(backbone.folder, model, file, form.name, form.rank, about, shown=True)
            _describe_lora(form, folder, backbone)
            record_file(folder, file)
        else:
            _write_form(form, backbone.folder, model, about)

    group.on_first(write)
    release_folder(folder)
    return file


def about_result(setup: RunSetup, backbone: Backbone) -> About:
    """What the files of a run say of themselves."""
    from sculpt_dist.report.card import base_name, licence_of, title

    config = plain_values(setup.config)
    return About(
        title(config),
        tuple(concept.target for concept in setup.concepts),
        setup.method_name,
        base_name(config),
        version("sculpt-dist"),
        backbone.image_size,
        licence_of(backbone.folder).get("license"),
    )


def _describe_lora(form: Form, run: Path, backbone: Backbone) -> None:
    """A model card beside the adapter, where that has a folder of its own."""
    if form.name == "lora" and form.output is None:
        file = form.file(run)
        write_card(run, backbone, file.parent, str(read_lost(file)))


def _write_form(form: Form, base: Path, model: Path, about: About) -> Path:
    """The exported folder in another form."""
    from sculpt_dist.backbones.formats.delta import write_delta
    from sculpt_dist.backbones.formats.original import write_single_file

    output, run = form.file(model.parent), model.parent
    if form.name in ("single", "delta"):
        make_room_for_file(run, output)
        if form.name == "single":
            write_single_file(model, output, about)
        else:
            write_delta(base, model, output, about)
        record_file(run, output)
    return output


def _write_adapter(
    backbone: Backbone,
    weights: Iterator[tuple[str, Tensor | None]],
    file: Path,
    form: Form,
    about: About | None,
    group: Group,
) -> None:
    """All ranks enter, the first writes.

    The source is not the exported folder: its dtype may have rounded small changes away.
    """
    try:
        if group.is_first:
            merged = backbone.merged(weights)
            write_adapter_of(backbone.folder, merged, file, form.name, form.rank, about, shown=True)
    finally:
        for _ in weights:  # each is summed over all ranks; the others would wait for a rank that stops early
            pass
