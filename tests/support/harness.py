"""How the tests launch commands and ranks, and the smallest configuration of the real thing."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from forked import SET_BY_LIBRARIES, Forked, is_forkable
from gpus import hide_gpus
from safetensors.torch import load_file

hide_gpus()  # the tests start more ranks than a machine has GPUs
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup: what they start would ignore it, too
BEFORE = set(os.environ)
STOPPED = 75  # exit code of a run that stopped and saved
PATIENCE = 2.0  # seconds between a rank's failure and the end of the others
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
ONE_STEP = [
    *SMALL,
    "evaluate.enabled=false",
    "train.steps=1",
    "mask.collect=1",
    "prepare.samples=2",
    "train.batch=2",
    "concepts=[{target: bird, superclass: animal}]",
]

TINIEST = [  # of dm_cal: one concept in two steps, scored on two images
    *SMALL,
    "train.steps=1",
    "train.batch=2",
    "mask.collect=1",
    "prepare.samples=2",
    "evaluate.objects=[bird,boat]",
    "evaluate.styles=[neon]",
    "evaluate.paraphrase_images=0",
    "concepts=[{target: bird, superclass: animal}]",
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


@functools.cache
def forking() -> Path:
    """The folder of a running server that forks processes; `python` in it stands in for Python.

    Ends with this process. See workers/forking.py.
    """
    folder = Path(tempfile.mkdtemp(prefix="forking-"))
    (folder / "environment.json").write_text(json.dumps(AT_START))
    stand_in = folder / "python"
    stand_in.write_text(
        f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(PROJECT / 'tests' / 'support')!r})\n"
        f"import forked\nforked.stand_in({str(folder)!r}, {sys.executable!r}, sys.argv[1:])\n"
    )
    stand_in.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, str(PROJECT / "tests" / "workers" / "forking.py"), str(folder / "socket")],
        env=AT_START,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if "ready\n" not in iter(server.stdout.readline, ""):  # after what libraries print
        raise RuntimeError("tests/workers/forking.py ended while importing")

    def end() -> None:
        server.stdin.close()
        server.wait(10)
        shutil.rmtree(folder)

    atexit.register(end)
    return folder


def python() -> str:
    """A Python that has imported everything; other commands than the project's it passes to the real one."""
    return str(forking() / "python")


class Ranks:
    """`python ARGUMENTS` on so many forked ranks, which write to the file `output`.

    `modules`: a folder with further Python modules.
    """

    def __init__(self, ranks: int, *arguments: str, output: Path, modules: Path | None = None) -> None:
        environment = rank_environment()
        if modules is not None:
            environment["PYTHONPATH"] += os.pathsep + str(modules)
        if ranks > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
            environment |= {"LOCAL_WORLD_SIZE": str(ranks)}
        self.processes: list[Forked] = []
        with open(output, "ab") as out, open(os.devnull) as nothing:
            streams = (nothing.fileno(), out.fileno(), out.fileno())
            for rank in range(ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
                self.processes.append(Forked(str(forking()), arguments, environment | own, streams))

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def poll(self) -> int | None:
        """The exit code of the first rank that has ended; None while all of them work."""
        return next((code for code in (process.poll() for process in self.processes) if code is not None), None)

    def wait(self, timeout: float) -> list[int]:
        """The exit codes. When one rank fails, the others are ended, as a launcher does; all after so many seconds."""
        kill_at = time.monotonic() + timeout
        end_at: float | None = None
        while None in (codes := [process.poll() for process in self.processes]):
            now = time.monotonic()
            if end_at is None and any(code not in (None, 0, STOPPED) for code in codes):
                end_at = now + PATIENCE
                kill_at = min(kill_at, now + 4 * PATIENCE)
            if now > kill_at or (end_at is not None and now > end_at):
                for process in self.processes:
                    process.send_signal(signal.SIGKILL if now > kill_at else signal.SIGTERM)
                time.sleep(0.5)
            time.sleep(0.01)
        return codes


def launch(ranks: int, *arguments: str, timeout: float = 300, code: int = 0, modules: Path | None = None) -> str:
    """Run `python ARGUMENTS` on so many ranks; returns what they printed, and checks the exit code of the first that
    failed.

    `arguments`: a script, or `-m sculpt_dist ...`. `modules`: a folder with further Python modules.
    """
    if not is_forkable(rank_environment(), AT_START):
        assert modules is None
        warnings.warn("ranks are started anew, slowly: their environment differs", stacklevel=2)
        return launch_anew(ranks, *arguments, timeout=timeout, code=code)
    with tempfile.NamedTemporaryFile("r", suffix=".txt") as output:
        codes = Ranks(ranks, *arguments, output=Path(output.name), modules=modules).wait(timeout)
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
