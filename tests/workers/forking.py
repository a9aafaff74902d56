"""Runs scripts and the command line in forked children of a process that has already imported everything.

A line on stdin is a request: {"arguments" (`SCRIPT ...` or `-m sculpt_dist ...`), "environment", "ranks", "port",
"output"}. The answer on stdout is two lines: the process ids of the ranks, and their exit codes once all have ended (a
killed rank has minus the signal number). When one rank fails it ends the others, as a launcher does.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback

import sculpt_dist.backbones.sana
import sculpt_dist.backbones.sd15
import sculpt_dist.backbones.sdxl
import sculpt_dist.report.page
import sculpt_dist.run.stages  # noqa: F401
from sculpt_dist.cli import main as cli

HEAVY = """
    deepspeed diffusers.pipelines.stable_diffusion diffusers.models.unets.unet_2d_condition diffusers.models
    transformers.models.clip diffusers.schedulers torchmetrics matplotlib.pyplot rich.table rich.progress webdataset
"""
for heavy in HEAVY.split():
    importlib.import_module(heavy)
import accelerate  # noqa: E402, F401
from diffusers import AutoencoderDC, AutoencoderKL, SanaTransformer2DModel, UNet2DConditionModel  # noqa: E402, F401
from transformers import CLIPTextModel, CLIPTokenizer, Gemma2Model  # noqa: E402, F401

PATIENCE = 2.0  # seconds between a failure and the end of the other ranks


def become_rank(request: dict, rank: int) -> None:
    """Turn this child process into the rank; does not return."""
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["ranks"] > 1:
        ranks, port = str(request["ranks"]), str(request["port"])
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=ranks,
            LOCAL_WORLD_SIZE=ranks,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    script, *arguments = request["arguments"]
    try:
        if script == "-m":
            sys.argv = ["sculpt-dist", *arguments[1:]]
            cli.main()
        sys.argv = [script, *arguments]
        sys.path.insert(0, os.path.dirname(script))
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(request: dict) -> list[int]:
    children: dict[int, int] = {}
    for rank in range(request["ranks"]):
        child = os.fork()
        if child == 0:
            become_rank(request, rank)
        children[child] = rank
    print(json.dumps(list(children)), flush=True)
    codes, failed_at, left = [0] * request["ranks"], None, dict(children)
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG if failed_at else 0)
        if pid:
            codes[left.pop(pid)] = os.waitstatus_to_exitcode(status)
            if status and failed_at is None and codes[children[pid]] != cli.STOPPED:
                failed_at = time.monotonic()
        elif failed_at and time.monotonic() - failed_at > PATIENCE:
            for other in left:
                os.kill(other, signal.SIGTERM if time.monotonic() - failed_at < 4 * PATIENCE else signal.SIGKILL)
            time.sleep(0.5)
        else:
            time.sleep(0.02)
    return codes


assert threading.active_count() == 1, "a process with threads cannot be forked safely"
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(run(json.loads(line))), flush=True)
