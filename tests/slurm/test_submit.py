"""The script that `submit` sends, and the errors raised before it is sent. Real jobs are in test_slurm.py."""

from __future__ import annotations

import re
import subprocess

import pytest
from harness import PROJECT, rank_environment, sculpt

from sculpt_dist.core.errors import ConfigError, SubmitError
from sculpt_dist.slurm.submit import SCRIPTS, Request, compose, send

CONFIG = PROJECT / "configs" / "canvas" / "dm_cal_sana.yaml"


def options(script: str) -> list[str]:
    return re.findall(r"^#SBATCH --(\S+)$", script, re.MULTILINE)


def test_the_script_is_the_shipped_one_with_its_options_set():
    shipped = (SCRIPTS / "unlearn.sbatch").read_text()
    script = compose(
        Request(CONFIG, ("train.batch=16",), 2, 4, "1:00:00", "gpu", ("account=vision", "exclusive"), "torchrun")
    )
    found = options(script)
    assert len(found) == len({option.partition("=")[0] for option in found})  # each once
    assert {
        "nodes=2",
        "ntasks-per-node=4",
        "gpus-per-node=4",
        "time=1:00:00",
        "partition=gpu",
        "account=vision",
        "exclusive",
    } < set(found)
    assert {option.partition("=")[0] for option in options(shipped)} < {option.partition("=")[0] for option in found}
    assert "requeue" in found and "LAUNCH=torchrun" in script and script.endswith(shipped.splitlines()[-1] + "\n")


def test_without_gpus_each_node_has_one_rank_and_no_gpu_option():
    found = options(compose(Request(CONFIG, (), 2)))
    assert "ntasks-per-node=1" in found and not any("gpus" in option for option in found)


def test_overrides_pass_through_the_shell_unchanged(tmp_path):
    override = 'concepts=[{target: "it\'s $HOME `x`", superclass: animal}]'
    script = compose(Request(CONFIG, (override,)))
    (line,) = (line for line in script.splitlines() if line.startswith("set -- "))
    done = subprocess.run(["bash", "-c", f'{line}; printf "%s" "$2"'], capture_output=True, text=True, check=True)
    assert done.stdout == override


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(CONFIG, ("train.stepz=1",)), "Did you mean: 'steps'"),
        (Request(CONFIG, ("train.batch=12",), 2, 4), "train.batch=12 is not divisible by ranks 8"),
        (Request(CONFIG, ("method.lable=1",)), "lable"),
        (Request(CONFIG, (), 0), "--nodes 0"),
        (Request(CONFIG, launch="mpirun"), "--launch mpirun: choose one of srun, torchrun"),
        (Request(CONFIG, options=("time=1\n#SBATCH --uid=0",)), "write a long option of sbatch"),
        (Request(CONFIG, options=("comment=a; touch x",)), "write a long option of sbatch"),
        (Request(CONFIG, time="1\ntouch x"), "is none that Slurm knows"),
        (Request(CONFIG, time="soon"), "is none that Slurm knows"),
        (Request(CONFIG, partition="a\ntouch x"), "is none that Slurm knows"),
    ],
)
def test_a_run_that_cannot_start_is_refused_before_it_is_queued(request_, message):
    with pytest.raises(ConfigError, match=message):
        compose(request_)


def test_without_slurm_the_error_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubmitError, match="sbatch is not on the PATH: .* --print"):
        send("#!/bin/bash\n")


def test_print_shows_the_script_and_folder_prints_the_run_folder():
    printed = sculpt("submit", str(CONFIG), "--nodes", "2", "--print")
    assert printed.startswith("#!/bin/bash\n") and "#SBATCH --nodes=2\n" in printed
    assert sculpt("folder", str(CONFIG), "run.folder=runs/x") == "runs/x\n"


@pytest.mark.parametrize(
    "script",
    sorted(path for path in SCRIPTS.iterdir() if path.suffix in (".sh", ".sbatch")),
    ids=lambda path: path.name,
)
def test_every_script_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert (PROJECT / "slurm").resolve() == SCRIPTS.resolve()  # one folder, two names


def test_the_site_file_works_unchanged():
    script = f"set -euo pipefail; SRUN_OPTIONS=() RUNNER=(); source {SCRIPTS / 'env.sh'}; python -c 'import sys'"
    subprocess.run(["bash", "-c", script], check=True, env=rank_environment(), cwd=PROJECT)
