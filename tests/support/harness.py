"""How the tests launch commands and ranks, and the smallest configuration of the real thing."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import torch
from gpus import hide_gpus
from safetensors.torch import load_file

hide_gpus()  # the tests start more ranks than a machine has GPUs
BEFORE = set(os.environ)
SET_BY_LIBRARIES = (  # in the tests' own process, when they are imported there
    "PYTEST_CURRENT_TEST LOCAL_RANK DS_ACCELERATOR DEEPSPEED_LOG_LEVEL TORCH_EXTENSIONS_DIR "
    "PYTORCH_NVML_BASED_CUDA_CHECK "
    "DIFFUSERS_VERBOSITY TRANSFORMERS_VERBOSITY TORCHINDUCTOR_CACHE_DIR WANDB_ERROR_REPORTING"
).split()
PROJECT = Path(__file__).parents[2]
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
    inherited = {name: value for name, value in os.environ.items() if name not in SET_BY_LIBRARIES or name in BEFORE}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{PROJECT}{os.pathsep}{PROJECT / 'tests' / 'support'}"}


AT_START = rank_environment()  # before any test changes it


class Forking:
    """Ranks that start at once (see workers/forking.py): a launcher and imports for each would take most of the
    time.
    """

    def __init__(self) -> None:
        self.environment = AT_START
        self.process = subprocess.Popen(
            [sys.executable, str(PROJECT / "tests" / "workers" / "forking.py")],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.process.kill)
        if "ready\n" not in iter(self.process.stdout.readline, ""):  # after what libraries print
            raise RuntimeError("tests/workers/forking.py ended while importing")

    def begin(self, *arguments: str, ranks: int, output: Path) -> list[int]:
        """Start the ranks; returns their process ids."""
        request = {
            "arguments": arguments,
            "environment": self.environment,
            "ranks": ranks,
            "port": free_port(),
            "output": str(output),
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self, pids: list[int], timeout: float) -> list[int]:
        """Wait for the ranks; returns their exit codes. Kills them after so many seconds."""
        timer = threading.Timer(
            timeout, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids if Path(f"/proc/{pid}").exists()]
        )
        timer.start()
        try:
            return json.loads(self.process.stdout.readline())
        finally:
            timer.cancel()


@functools.cache
def forking() -> Forking:
    return Forking()


def launch(ranks: int, *arguments: str, timeout: float = 300, code: int = 0) -> str:
    """Run `python ARGUMENTS` on so many ranks; returns what they printed, and checks the exit code of the first that
    failed.

    `arguments`: a script, or `-m sculpt_dist ...`.
    """
    changed = sorted(dict(forking().environment.items() ^ rank_environment().items()))
    if changed:  # libraries read their settings when they are imported
        warnings.warn(f"ranks are started anew, slowly: the environment differs in {changed}", stacklevel=2)
        return launch_anew(ranks, *arguments, timeout=timeout, code=code)
    with tempfile.NamedTemporaryFile("r", suffix=".txt") as output:
        codes = forking().end(forking().begin(*arguments, ranks=ranks, output=Path(output.name)), timeout)
        printed = output.read()
    assert code in codes and (code or not any(codes)), f"exit codes {codes}\n{printed[-6000:]}"
    return printed


def sculpt(*arguments: str, ranks: int = 1, code: int = 0, timeout: float = 300) -> str:
    """The command line on so many ranks, as `launch`."""
    return launch(ranks, "-m", "sculpt_dist", *arguments, code=code, timeout=timeout)


def launch_anew(ranks: int, *arguments: str, timeout: float = 300, code: int = 0) -> str:
    """The same by processes of their own, several by torchrun."""
    command = rank_command(ranks, *arguments) if ranks > 1 else [sys.executable, *arguments]
    done = subprocess.run(
        command, env=rank_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    exact = ranks == 1  # torchrun ends with 1 whenever a rank does not end with 0
    assert done.returncode == code if exact else bool(done.returncode) == bool(code), done.stdout[-6000:]
    return done.stdout


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The exported denoiser of a run folder."""
    (net,) = [part for part in (run / "model").iterdir() if part.name in ("unet", "transformer")]
    return load_file(net / "diffusion_pytorch_model.safetensors")
