"""The command line: what there is, completion, and mistakes that are reported before torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
from harness import PROJECT, rank_environment, sculpt

from sculpt_dist.cli.options import complete_override

CONFIG = str(PROJECT / "configs" / "canvas" / "dm_cal.yaml")
MISTAKES = {
    "trian.lr=1e-4": ["trian", "Did you mean one of: 'train'"],
    "train.lrr=1e-4": ["train", "lrr", "Did you mean", "lr"],
    "method.retain_wight=1": ["method.retain_wight: dm_cal has no such option", "Did you mean 'method.retain_weight'?"],
    "method.name=edm": ["method.name=edm: there is no such method", "Did you mean 'esd'?"],
    "model.arch=sd9": ["model.arch=sd9: there is no such backbone", "sana, sd15, sdxl"],
    "model.path=/nowhere": ["model.path=/nowhere: there is no such folder"],
}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`sculpt-dist ARGUMENTS` in a process of its own; its last line of stderr tells whether torch was imported."""
    code = (
        "import atexit, sys; "
        "atexit.register(lambda: print('torch imported:', 'torch' in sys.modules, file=sys.stderr)); "
        "from sculpt_dist.cli.main import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=rank_environment(), timeout=60
    )


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["config", "train"], ["train.lr", "train.batch", "train.steps", "3e-06", "Peak learning rate."]),
        (["config", "method.esd"], ["method.esd.eta", "Strength of the negative guidance."]),
        (["methods"], ["concept_ablation", "dm_cal", "esd", "kscu", "rgd", "salun", "surgun", "uce", "SurgUn:"]),
        (["models"], ["sana", "sd15", "sdxl", "UNet2DConditionModel"]),
        (["metrics"], ["clip_score", "fid", "kid", "canvas", "clip", "Zero-shot"]),
    ],
    ids=["config train", "config method.esd", "methods", "models", "metrics"],
)
def test_a_listing_prints_names_and_meanings_without_torch(arguments, names):
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in names), done.stdout
    assert done.stderr == "torch imported: False\n"


def test_config_prints_only_the_keys_that_begin_with_the_prefix():
    done = command("config", "train")
    assert "train.lr" in done.stdout
    assert "mask.keep" not in done.stdout and "model.path" not in done.stdout


def test_config_refuses_a_prefix_without_keys():
    done = command("config", "trian")
    assert done.returncode == 2
    assert "ConfigError: no key begins with 'trian'" in done.stderr


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_exits_with_2_and_is_named_before_torch_is_imported(override, tmp_path):
    done = command("unlearn", CONFIG, f"run.folder={tmp_path / 'run'}", override)
    assert done.returncode == 2, done.stderr
    message, probe = done.stderr.splitlines()
    assert all(part in message for part in MISTAKES[override]), message
    assert probe == "torch imported: False"
    assert not (tmp_path / "run").exists()


def test_unlearn_announces_that_it_loads_libraries(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "sculpt_dist", "unlearn", CONFIG, f"run.folder={tmp_path / 'run'}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=rank_environment(),
    )
    try:
        assert process.stderr.readline() == "loading torch and diffusers ...\n"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("incomplete", "completions"),
    [
        ("model.ar", ["model.arch="]),
        ("model.arch=s", ["model.arch=sana", "model.arch=sd15", "model.arch=sdxl"]),
        ("evaluate.classifier=c", ["evaluate.classifier=canvas", "evaluate.classifier=clip"]),
        ("nonsense", []),
        ("train.lr=", []),
    ],
)
def test_an_override_is_completed_to_the_keys_and_names_that_exist(incomplete, completions):
    assert complete_override(incomplete) == completions


def test_every_method_file_completes_method_name():
    files = [file for kind in ("methods", "guards") for file in (PROJECT / "sculpt_dist" / kind).glob("*.py")]
    names = sorted(file.stem for file in files if file.stem not in ("__init__", "base"))
    assert complete_override("method.name=") == [f"method.name={name}" for name in names]


def test_the_version_is_printed():
    from importlib.metadata import version

    assert sculpt("--version").strip() == f"sculpt-dist {version('sculpt-dist')}"
