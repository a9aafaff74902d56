"""The configurations that come with the program: by name wherever it is installed, also from a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from harness import PROJECT

from sculpt_dist.config.load import load_config
from sculpt_dist.config.packaged import copy_config, find_config, packaged_configs
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.experiments.compare import comparison_cells, read_comparison
from sculpt_dist.experiments.trials import read_sweep

NAMES = ["canvas/dm_cal", "configs/canvas/dm_cal.yaml", "canvas/dm_cal.yaml"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_configuration_is_found_by_name_from_any_folder(elsewhere, name):
    assert load_config(Path(name)) == load_config(PROJECT / "configs" / "canvas" / "dm_cal.yaml")


def test_a_file_that_is_there_comes_before_a_packaged_one(elsewhere):
    file = elsewhere / "configs" / "canvas" / "dm_cal.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("run: {folder: mine}\n")
    assert load_config(Path(NAMES[1])).run.folder == "mine"


@pytest.mark.parametrize("name", ["../pyproject", "/etc/passwd", "canvas/nothing", "", "a" * 300])
def test_a_name_leads_to_no_other_file(elsewhere, name):
    assert find_config(Path(name)) == Path(name)


def test_an_unknown_name_is_refused_with_the_list(elsewhere):
    with pytest.raises(ConfigError, match=r"canvas/dm_kal: there is no .*; `sculpt-dist configs` lists"):
        load_config(Path("canvas/dm_kal"))


def test_every_configuration_of_the_project_is_packaged_with_what_it_is_for():
    files = {str(file.relative_to(PROJECT / "configs")) for file in (PROJECT / "configs").glob("**/*.yaml")}
    assert {f"{name}.yaml" for name in packaged_configs()} == files
    assert [name for name, line in packaged_configs().items() if not line] == []


def test_packaged_comparisons_and_sweeps_name_configurations_that_are_found(elsewhere):
    comparison = find_config(Path("compare/canvas"))
    cell = next(comparison_cells(read_comparison(comparison), comparison, []))
    assert cell.file.is_file()
    sweep = read_sweep(Path("sweeps/canvas-grid"))
    assert load_config(sweep.config).method["name"] == "dm_cal"


def test_a_copy_takes_what_the_configuration_builds_on_and_overwrites_nothing(elsewhere):
    copies = copy_config("canvas/dm_cal_sana", Path("mine"))
    assert {str(file) for file in copies} == {f"mine/canvas/{name}.yaml" for name in ("dm_cal_sana", "dm_cal", "world")}
    assert load_config(Path("mine/canvas/dm_cal_sana.yaml")) == load_config(Path("canvas/dm_cal_sana"))
    copy_config("canvas/dm_cal_sana", Path("mine"))
    Path("mine/canvas/world.yaml").write_text("# changed\n")
    with pytest.raises(ConfigError, match=r"mine/canvas/world.yaml: is another file already"):
        copy_config("canvas/dm_cal_sana", Path("mine"))
    with pytest.raises(ConfigError, match="no such packaged configuration; `sculpt-dist configs` lists them"):
        copy_config("../pyproject", Path("mine"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which a wheel of the project was unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if name.startswith(("sculpt_dist", "configs", "pyproject.toml", "README.md", "LICENSE")):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, folder / "source" / name, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run([*command, str(folder / "source")], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder / "site")
    return folder


@pytest.mark.slow
def test_the_commands_of_the_readme_work_from_a_wheel(installed):
    """In a folder without the project."""
    work = installed / "work"
    work.mkdir()
    environment = os.environ | {"PYTHONPATH": str(installed / "site")}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "sculpt_dist", *arguments]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    place = [sys.executable, "-c", "import sculpt_dist; print(sculpt_dist.__file__)"]
    imported = subprocess.run(place, cwd=work, env=environment, capture_output=True, text=True).stdout
    assert Path(imported.strip()).is_relative_to(installed / "site")
    assert run("folder", "canvas/dm_cal") == "runs/canvas-dm_cal\n"
    assert "compare/canvas" in run("configs")
    assert "UNet2DConditionModel" in run("check", "configs/canvas/dm_cal.yaml")
    assert run("folder", "configs/sd15/dm_cal.yaml", "model.path=x/y", "run.folder=here") == "here\n"
    assert "LAUNCH=srun" in run("submit", "canvas/dm_cal", "--print")
    listed = [
        sys.executable,
        "-c",
        "from sculpt_dist.data import read_prompts; print(len(read_prompts('gallery/hold.txt')))",
    ]
    assert subprocess.run(listed, cwd=work, env=environment, capture_output=True, text=True).stdout == "408\n"
