"""Files that a user has put where a run writes stay: refused before anything is written, or renamed and named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from harness import ONE_STEP, PROJECT, sculpt
from safetensors.torch import load_file

from sculpt_dist.config.load import load_config, to_yaml
from sculpt_dist.core.files import sealed_text


@pytest.mark.parametrize("name", ["mine.csv", "embeddings.safetensors", "object-bird/target/00000.tar", "a/b/c/d.tar"])
def test_a_users_own_data_in_a_folder_without_a_run_is_refused(canvas_config, tmp_path, name):
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    for command in ("prepare", "unlearn"):
        printed = sculpt(command, canvas_config, *ONE_STEP, f"run.folder={tmp_path}", code=2)
        assert f"contains files of something else (data/{name})" in printed
    assert file.read_text() == "precious" and not (tmp_path / "config.yaml").exists()


def test_data_of_another_run_may_be_copied_before_the_first_run(canvas_config, one_step_run, tmp_path):
    shutil.copytree(one_step_run / "data", tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    sculpt("prepare", canvas_config, *ONE_STEP, f"run.folder={tmp_path}")
    assert before and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")} == before


def test_a_users_files_among_a_runs_data_stay(canvas_config, run):
    place = run / "data" / "object-bird" / "target"
    (place / "mine.tar").write_text("precious")
    (run / "data" / "embeddings.safetensors").write_text("precious")
    sculpt("prepare", canvas_config, *ONE_STEP, f"run.folder={run}", "prepare.guidance=3", "run.override=true")
    assert (place / "mine.tar").read_text() == "precious"
    assert (run / "data" / "embeddings.safetensors.kept-1").read_text() == "precious"


def test_an_export_keeps_a_users_file_of_that_name_and_replaces_its_own(canvas_config, run):
    call = ["export", canvas_config, *ONE_STEP, f"run.folder={run}", "--as"]
    for form, name in (("single", "model.safetensors"), ("kohya", "kohya.safetensors")):
        (run / name).write_text("precious")
        printed = sculpt(*call, form)
        assert f"{run / name}: was not written by this run, so it is kept as" in printed
        assert (run / f"{name}.kept-1").read_text() == "precious" and load_file(run / name)
    assert "is kept as" not in sculpt(*call, "kohya") and not (run / "kohya.safetensors.kept-2").exists()


def test_a_configuration_that_a_user_edited_in_the_run_folder_is_kept(canvas_config, run):
    file = run / "config.yaml"
    mine = "# my notes\n" + file.read_text()
    file.write_text(mine)
    assert "was edited, so it is kept as" in sculpt("unlearn", str(file), f"run.folder={run}")
    assert (run / "config.yaml.kept-1").read_text() == mine and "# my notes" not in file.read_text()
    assert "kept" not in sculpt("unlearn", str(file), f"run.folder={run}")
    assert file.read_text() == sealed_text(to_yaml(load_config(file)))


def test_an_override_of_a_member_of_a_list_replaces_it():
    cat, car = (
        "{target: cat, superclass: animal, keep: [dog], prompts: ['a {concept}']}",
        "{target: car, superclass: x}",
    )
    two = f"concepts=[{cat},{car}]"
    first, second = load_config(None, [two, "concepts[0]={target: owl, superclass: bird}"]).concepts
    assert (first.target, first.keep, first.prompts, second.target) == ("owl", [], None, "car")
    first, _ = load_config(None, [two, "concepts[0].target=owl"]).concepts
    assert (first.target, first.keep) == ("owl", ["dog"])


def test_names_are_utf8_in_every_locale(tmp_path):
    place = tmp_path / "ünï"
    place.mkdir()
    (place / "cönfig.yaml").write_text("concepts: [{target: Käse, superclass: essen}]\n", encoding="utf-8")
    strict = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "sculpt_dist", "folder", str(place / "cönfig.yaml"), f"run.folder={place}"]
    done = subprocess.run(command, env=os.environ | strict, capture_output=True)
    assert done.returncode == 0 and done.stdout.decode().strip() == str(place), done.stderr.decode()
    odd = os.fsencode(place) + b"/\xff.yaml"
    done = subprocess.run([*command[:4], odd], env=os.environ | strict, capture_output=True)
    assert done.returncode == 2 and b"there is no such configuration file" in done.stderr, done.stderr.decode()
