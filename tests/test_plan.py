"""The plan: counts by hand, changes that fit, and its peaks against those of real engines, measured."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from big_models import SANA, UNET, write_model
from conftest import PROJECT, rank_command, rank_environment, sculpt

from sculpt_dist.config import load_config
from sculpt_dist.plan import plan_run

CANVAS = PROJECT / "configs" / "canvas" / "dm_cal.yaml"
CONCEPT = "concepts=[{target: bird, superclass: animal}]"
THREE_STEPS = ["train.steps=2", "mask.collect=1", "mask.refresh=1", "train.checkpoint_every=0", "evaluate.enabled=false"]
MEASURED = {  # what is measured: ranks, kind, stored as, overrides
    "stage 0": (1, "sana", torch.bfloat16, ["engine.stage=0", "train.batch=2"]),
    "stage 1": (2, "sana", torch.bfloat16, ["engine.stage=1", "train.batch=4"]),
    "stage 2": (2, "sana", torch.bfloat16, ["engine.stage=2", "train.batch=4"]),
    "stage 3": (2, "sana", torch.bfloat16, ["engine.stage=3", "train.batch=4"]),
    "stage 2, bf16": (1, "sana", torch.float32, ["engine.stage=2", "engine.precision=bf16", "train.batch=2"]),
    "stage 3, bf16": (2, "sana", torch.float32, ["engine.stage=3", "engine.precision=bf16", "train.batch=4"]),
    "stage 2, accumulation": (1, "sd15", torch.bfloat16, ["engine.stage=2", "train.batch=4", "train.accumulate=2"]),
    "stage 2, open moments": (1, "sana", torch.bfloat16, ["engine.stage=2", "train.batch=2", "engine.moments=open", "mask.keep=0.1"]),
    "stage 2, all trains": (2, "sd15", torch.bfloat16, ["engine.stage=2", "train.batch=2", "method.name=salun"]),
    "stage 3, all trains, two loss groups": (2, "sana", torch.bfloat16, ["engine.stage=3", "train.batch=2", "method={name: rgd, trains: all}"]),
}
SETTINGS = {"sana": SANA, "sd15": UNET}
IN_CI = ("stage 2, bf16",)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of at least 100 M parameters, each written when it is first asked for, as another type than it runs in: mapped files are not counted."""
    folder, written = tmp_path_factory.mktemp("models"), {}

    def model(arch, dtype):
        if (arch, dtype) not in written:
            written[arch, dtype] = folder / f"{arch}-{dtype}"
            assert write_model(written[arch, dtype], arch, SETTINGS[arch], dtype) > 100_000_000
        return written[arch, dtype]

    return model


def measure(ranks: int, arguments: list[str]) -> list[dict]:
    """The ranks' peaks. The C library returns what is freed at once: else it keeps some, which is no need of the run."""
    script = str(PROJECT / "tests" / "workers" / "footprint.py")
    environment = rank_environment() | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": str(1 << 18)}
    command = rank_command(ranks, script, *arguments)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in IN_CI else pytest.mark.huge) for case in MEASURED])
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(case, models, tmp_path):
    ranks, arch, dtype, overrides = MEASURED[case]
    settings = [f"model.arch={arch}", f"model.path={models(arch, dtype)}", CONCEPT, f"run.folder={tmp_path / 'run'}", *THREE_STEPS, *overrides]
    predicted = plan_run(load_config(None, settings), ranks, 1e12, device="cpu")
    told = measure(ranks, settings)
    measured = max(rank["peak"] for rank in told)
    print(f"\n{case}: {ranks} ranks, predicted {predicted['peak'] / 1e9:.3f} GB, measured {measured / 1e9:.3f}: {predicted['peak'] / measured - 1:+.1%}")
    assert told[0]["trained"] == predicted["trainable"] and predicted["parameters"] > 100_000_000
    assert predicted["peak"] == pytest.approx(measured, rel=0.1)
    steps = told[0]["steps"]
    sent = steps[-1]["bytes"] - steps[-2]["bytes"]
    assert sum(predicted["payload"].values()) == pytest.approx(sent, rel=0.1)
