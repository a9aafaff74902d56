"""Shared by the tests: how several ranks are launched, and the smallest configuration of the real thing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # several ranks on one machine, with or without a GPU
PROJECT = Path(__file__).parent.parent
TINY_RUN = [  # of any method
    "prepare.samples=6",
    "prepare.steps=4",
    "prepare.batch=3",
    "train.steps=6",
    "train.batch=4",
    "mask.collect=2",
    "evaluate.images=1",
    "evaluate.paraphrase_images=1",
    "evaluate.steps=2",
    "evaluate.bootstrap=20",
    "concepts=[{target: bird, superclass: animal},{target: boat, superclass: vehicle}]",
]
SMALL = [  # of dm_cal: pins what the tests count on, whatever the shipped configuration is tuned to
    *TINY_RUN,
    "mask.refresh=2",
    "mask.keep=0.5",
    "mask.scope=matrix",
    "mask.turnover=0.2",
    "train.lr=1e-3",
    "method.label_guidance=1.0",
    "method.retain_weight=0.1",
    "method.distill_weight=1.0",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_command(ranks: int, *arguments: str) -> list[str]:
    """`python ARGUMENTS` on so many ranks."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    return [sys.executable, *launcher, *arguments]


def rank_environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}


def launch(ranks: int, *arguments: str, timeout: float = 300, code: int = 0) -> str:
    """Run `python ARGUMENTS` on so many ranks; returns what it printed, and checks torchrun's exit code (0 or not)."""
    done = subprocess.run(
        rank_command(ranks, *arguments), env=rank_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    assert (done.returncode == 0) == (code == 0), done.stdout[-6000:]
    return done.stdout


def sculpt(*arguments: str, ranks: int = 1, code: int = 0, timeout: float = 300) -> str:
    """The command line on so many ranks; one rank runs without a launcher and its exit code is checked exactly."""
    if ranks > 1:
        return launch(ranks, "-m", "sculpt_dist", *arguments, code=code, timeout=timeout)
    done = subprocess.run(
        [sys.executable, "-m", "sculpt_dist", *arguments],
        env=rank_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == code, done.stdout[-6000:]
    return done.stdout


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The exported denoiser of a run folder."""
    (net,) = [part for part in (run / "model").iterdir() if part.name in ("unet", "transformer")]
    return load_file(net / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="session")
def canvas_config() -> str:
    return str(PROJECT / "configs" / "canvas" / "dm_cal.yaml")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--refresh-golden", action="store_true", help="write the golden losses anew; say why in the commit")
