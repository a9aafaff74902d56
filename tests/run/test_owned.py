"""A run removes and replaces only what it wrote itself."""

from __future__ import annotations

import errno
import shutil

import pytest
import torch
from harness import ONE_STEP, PROJECT, SMALL, TINY_RUN, launch, sculpt
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sculpt_dist.backbones.sd15 import Backbone
from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError, ModelError, NonFiniteError, RunFolderError
from sculpt_dist.engine.group import Group
from sculpt_dist.run.export import export_model
from sculpt_dist.run.model import base_fingerprint
from sculpt_dist.run.owned import make_room
from sculpt_dist.run.setup import resolve

ASSETS = PROJECT / "sculpt_dist/assets/canvas/sd15"


@pytest.mark.parametrize(
    "key", "model.path prepare.images evaluate.reference evaluate.clip evaluate.retain_prompts".split()
)
def test_an_input_inside_the_run_folder_is_refused_before_anything_is_written(tmp_path, key):
    (tmp_path / "project" / "base").mkdir(parents=True)
    for run, value in ((tmp_path / "project", tmp_path / "project" / "base"), (tmp_path, tmp_path / "link")):
        if value.name == "link":
            value.symlink_to(tmp_path / "project")
        given = [*ONE_STEP, "evaluate.reference=canvas", f"{key}={value}", f"run.folder={run}"]
        with pytest.raises(ConfigError, match=f"{key}=.*lies in run.folder="):
            resolve(load_config(PROJECT / "configs" / "canvas" / "dm_cal.yaml", given))


def test_a_folder_that_holds_a_model_but_no_run_is_refused(canvas_config, tmp_path):
    for name in ("model", "mine.safetensors", "checkpoints"):
        folder = tmp_path / name / "project"
        folder.mkdir(parents=True)
        (folder / name).mkdir()
        (folder / name / "precious").write_text("1")
        for fresh in ("false", "true"):
            printed = sculpt("unlearn", canvas_config, *ONE_STEP, f"run.folder={folder}", f"run.fresh={fresh}", code=2)
            assert "contains files of something else" in printed and (folder / name / "precious").exists()


def test_a_model_that_the_run_did_not_write_is_kept(canvas_config, run):
    shutil.rmtree(run / "model")
    shutil.copytree(ASSETS, run / "model")
    (run / "model" / "precious").write_text("1")
    printed = sculpt("unlearn", canvas_config, *ONE_STEP, f"run.folder={run}")
    assert "is kept as" in printed and (run / "model.kept-1" / "precious").exists()
    assert not (run / "model" / "precious").exists()
    (run / "model" / "notes.txt").write_text("a file of the user's")
    sculpt("unlearn", canvas_config, *ONE_STEP, f"run.folder={run}", "--fresh")
    assert (run / "model.kept-2" / "notes.txt").exists() and (run / "model.kept-1" / "precious").exists()


def test_an_export_replaces_the_models_that_the_run_wrote(run):
    make_room(run / "model")
    assert not (run / "model").exists() and not list(run.glob("model.kept-*"))


def test_files_of_others_in_a_run_folder_are_tolerated_and_named(canvas_config, run):
    (run / "notes.txt").write_text("1")
    (run / "slurm-4711.out").write_text("1")
    printed = sculpt("unlearn", canvas_config, *ONE_STEP, f"run.folder={run}")
    assert printed.count("also holds notes.txt: not of this run, left alone") == 1
    sculpt("unlearn", canvas_config, *ONE_STEP, f"run.folder={run}", "--fresh")
    assert (run / "notes.txt").exists() and (run / "slurm-4711.out").exists()


def test_folders_of_a_run_may_be_links_to_another_disk(canvas_config, tmp_path):
    run, disk = tmp_path / "run", tmp_path / "disk"
    run.mkdir()
    for name in ("model", "checkpoints", "data"):
        (disk / name).mkdir(parents=True)
    (run / "data").symlink_to(disk / "data")
    sculpt("unlearn", canvas_config, *ONE_STEP, f"run.folder={run}")
    for name in ("model", "checkpoints"):
        shutil.rmtree(disk / name)
        (run / name).rename(disk / name)
        (run / name).symlink_to(disk / name)
    for more in ([], ["--fresh"]):
        sculpt("unlearn", canvas_config, *ONE_STEP, f"run.folder={run}", *more)
        assert all((run / name).is_symlink() for name in ("model", "checkpoints", "data"))
        assert (disk / "model" / "model_index.json").is_file() and list((disk / "checkpoints").glob("step-*"))
    assert not list(disk.glob("*.kept-*"))


@pytest.mark.parametrize("place", ["circle", "/proc/x", "x" * 5000, "a\0b"])
def test_a_place_that_cannot_be_a_run_folder_is_refused_in_a_line(tmp_path, canvas_config, place):
    if place == "circle":
        (tmp_path / "circle").symlink_to(tmp_path / "circle")
        place = str(tmp_path / "circle")
    printed = sculpt("unlearn", canvas_config, *ONE_STEP, f"run.folder={place}", code=2)
    errors = [line for line in printed.splitlines() if not line.startswith("loading")]
    assert len(errors) == 1 and len(errors[0]) < 1000 and errors[0].startswith(("RunFolderError", "ConfigError"))


def test_weights_that_are_not_finite_after_the_last_update_are_neither_kept_nor_exported(canvas_config, tmp_path):
    for method in ("dm_cal", "esd", "surgun", "concept_ablation"):
        config, folder = str(PROJECT / "configs" / "canvas" / f"{method}.yaml"), tmp_path / method
        given = [*TINY_RUN, *ONE_STEP[-2:], "train.steps=1", "mask.collect=1", "evaluate.enabled=false"]
        given += ["train.lr=1e300", f"run.folder={folder}"]
        printed = sculpt("unlearn", config, *given, code=2)
        assert "NonFiniteError: a weight is not finite after update 0" in printed, method
        assert not (folder / "model").exists() and not list(folder.glob("checkpoints/step-0*-000000"))


def test_an_export_that_overflows_its_type_is_refused(tmp_path):
    backbone = Backbone(ASSETS, torch.float32, torch.device("cpu"))
    name = next(name for name, _ in backbone.net.named_parameters() if name.endswith("to_k.weight"))
    tensor = torch.full_like(backbone.net.get_parameter(name).detach(), 1e30)
    (tmp_path / "model").mkdir()
    for dtype in ("bfloat16", "float16"):
        if dtype == "float16":
            with pytest.raises(NonFiniteError, match=f"{name}: a weight is not finite in torch.float16"):
                export_model(dtype, backbone, [(name, tensor)], tmp_path / "model", Group(60))
        else:
            export_model(dtype, backbone, [(name, tensor)], tmp_path / "model", Group(60))
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".model-written"}  # the earlier export stays
    assert (tmp_path / "model" / "model_index.json").is_file()


def test_a_full_disk_leaves_the_earlier_model_and_no_debris(tmp_path, monkeypatch):
    backbone = Backbone(ASSETS, torch.float32, torch.device("cpu"))
    export_model("float32", backbone, [], tmp_path / "model", Group(60))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sculpt_dist.backbones.io.writing.write_checksums", full)
    with pytest.raises(RunFolderError, match=r"model: cannot be written: .*No space left on device.* GB free"):
        export_model("float32", backbone, [], tmp_path / "model", Group(60))
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".model-written"}


def test_samples_that_are_not_finite_are_refused_when_they_are_drawn(canvas_config, tmp_path):
    given = [*ONE_STEP, "prepare.guidance=1e38", f"run.folder={tmp_path / 'run'}"]
    printed = sculpt("prepare", canvas_config, *given, code=2)
    assert "NonFiniteError: the samples of object bird target: prepare.guidance=1e+38 draws values" in printed
    assert not list((tmp_path / "run").rglob("*.tar"))


def test_changed_embeddings_are_made_anew(run):
    file = run / "data" / "embeddings.safetensors"
    with safe_open(file, "pt") as content:
        about = content.metadata()
    backbone = Backbone(ASSETS, torch.float32, torch.device("cpu"))
    assert backbone.read_embeddings(file, about["key"])
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, about)
    assert not backbone.read_embeddings(file, about["key"])


def test_a_cut_list_of_checksums_is_refused(run):
    base_fingerprint(run / "model")
    lines = (run / "model" / "CHECKSUMS").read_text().splitlines(keepends=True)
    for kept in ([], lines[1:], lines[:-1]):
        (run / "model" / "CHECKSUMS").write_text("".join(kept))
        with pytest.raises(ModelError, match="is not in CHECKSUMS"):
            base_fingerprint(run / "model")
    (run / "model" / "CHECKSUMS").write_text("".join([*lines, "0" * 64 + "  unet/gone.safetensors\n"]))
    with pytest.raises(ModelError, match=r"gone\.safetensors: is missing, but CHECKSUMS lists it"):
        base_fingerprint(run / "model")


def test_a_long_name_is_forgotten_and_drawn(canvas_config, tmp_path):
    name = "x" * 280
    given = [*SMALL, "train.steps=1", "mask.collect=1", "prepare.samples=2", "train.batch=2", "model.cut_prompts=true"]
    given += [f"concepts=[{{target: {name}, superclass: animal}}]", "evaluate.objects=[bird]", "evaluate.styles=[neon]"]
    given += [f"run.folder={tmp_path / 'run'}", "evaluate.classifier=own:any_detector:Blind"]
    detector = "from sculpt_dist.evaluation.classifiers.base import Classifier, Verdict\nimport torch\n"
    detector += "class Blind(Classifier):\n    def classify(self, images):\n"
    detector += "        return Verdict(torch.full((len(images),), -1), torch.full((len(images),), -1))\n"
    (tmp_path / "any_detector.py").write_text(detector)
    launch(1, "-m", "sculpt_dist", "unlearn", canvas_config, *given, modules=tmp_path)
    (image,) = (tmp_path / "run" / "evaluation" / "after-00" / "images").glob("xxx*--neon.png")
    assert len(image.name) < 100
    assert (tmp_path / "run" / "report" / "report.html").is_file()


def test_a_model_that_was_edited_in_place_is_kept(canvas_config, run):
    weights = run / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"edited")
    printed = sculpt("unlearn", canvas_config, *ONE_STEP, f"run.folder={run}")
    assert "is kept as" in printed
    assert (run / "model.kept-1" / "unet" / weights.name).read_bytes() == b"edited"


def test_another_configuration_does_not_replace_a_finished_model(canvas_config, run):
    shutil.rmtree(run / "checkpoints")  # to save room
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    printed = sculpt("unlearn", canvas_config, *ONE_STEP, "train.lr=0.5", f"run.folder={run}", code=2)
    assert "belongs to a run with another configuration" in printed and (run / "model").is_dir()


def test_fresh_empties_no_link_that_leads_to_other_things(canvas_config, run, tmp_path):
    for name in ("lora", "wandb", "checkpoints", "report"):
        (tmp_path / "shared" / name).mkdir(parents=True)
        (tmp_path / "shared" / name / "precious").write_text("1")
        if (run / name).exists():
            shutil.rmtree(run / name)
        (run / name).symlink_to(tmp_path / "shared" / name)
    (run / "model.safetensors").write_text("the user's")
    sculpt("unlearn", canvas_config, *ONE_STEP, f"run.folder={run}", "--fresh")
    assert len(list((tmp_path / "shared").glob("*/precious"))) == 4
    assert (run / "model.safetensors.kept-1").read_text() == "the user's"


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_folder_whose_config_is_no_file_is_refused(canvas_config, tmp_path, kind):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "thesis.tex").write_text("precious")
    (tmp_path / "config.yaml").mkdir() if kind == "folder" else (tmp_path / "config.yaml").symlink_to("/nowhere/c.yaml")
    for more in ([], ["--fresh"]):
        sculpt("unlearn", canvas_config, *ONE_STEP, f"run.folder={tmp_path}", *more, code=2)
    assert (tmp_path / "report" / "thesis.tex").exists()


def test_a_base_behind_the_runs_own_model_and_a_run_inside_its_base_are_refused(tmp_path):
    shutil.copytree(ASSETS, tmp_path / "base")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(tmp_path / "base")
    for folder in (tmp_path / "run", tmp_path / "base" / "run"):
        given = [*ONE_STEP, f"model.path={tmp_path / 'base'}", f"run.folder={folder}"]
        with pytest.raises(ConfigError, match=r"model\.path=.*lies in run\.folder="):
            resolve(load_config(PROJECT / "configs" / "canvas" / "dm_cal.yaml", given))


def test_a_users_copies_of_checkpoints_stay(canvas_config, run):
    (newest,) = (run / "checkpoints").glob("step-001-000000")
    copies = [newest.with_name(f"step-000-00000{i}-mine") for i in range(3)]
    for copy in copies:
        shutil.copytree(newest, copy)
    more = "concepts=[{target: bird, superclass: animal},{target: boat, superclass: vehicle}]"
    sculpt("unlearn", canvas_config, *ONE_STEP, more, f"run.folder={run}", "--override")
    assert all(copy.is_dir() for copy in copies)
