"""All tests hide the machine's GPUs, except those marked `gpu`.

CUDA reads CUDA_VISIBLE_DEVICES once per process, so each test marked `gpu` runs in a child pytest in which the GPUs are
visible.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import torch

MARK = "SCULPT_GPU_TEST"  # set in the environment of such a child
GIVEN = os.environ.get("CUDA_VISIBLE_DEVICES")


def in_gpu_process() -> bool:
    return MARK in os.environ


def hide_gpus() -> None:
    """Hide all GPUs from this process and its children, unless it runs a test marked `gpu`."""
    if not in_gpu_process():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def gpu_environment() -> dict[str, str]:
    """The environment in which the GPUs are visible again, as they were before the tests began."""
    environment = os.environ | {MARK: "1"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    return environment if GIVEN is None else environment | {"CUDA_VISIBLE_DEVICES": GIVEN}


@functools.cache
def has_gpu() -> bool:
    if torch.version.cuda is None:
        return False
    query = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", query], env=gpu_environment()).returncode == 0


def run_in_gpu_process(test: str) -> None:
    """Run one test, given by its pytest node id, in a child pytest with visible GPUs; fails with its output."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", test]
    child = subprocess.run(
        command, env=gpu_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    assert child.returncode == 0 and "1 passed" in child.stdout, child.stdout[-6000:]
