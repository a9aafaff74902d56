"""Starts processes at once by forking one that has already imported everything; imports would take most of their time.

It listens on the Unix socket argv[1]. A request is one JSON line, {"arguments" (`SCRIPT ...` or `-m sculpt_dist ...`),
"environment", "folder", "python"}, sent with the three standard streams. The answers are two lines: the process id, and
the exit code (minus the signal number of a killed process). A client that goes away takes its process with it.
`support/forked.py` is the client.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback

import sculpt_dist.backbones.sana
import sculpt_dist.backbones.sd15
import sculpt_dist.backbones.sdxl
import sculpt_dist.report.page
import sculpt_dist.run.stages  # noqa: F401
from sculpt_dist.cli import main as cli
from sculpt_dist.experiments import warm

HEAVY = """
    deepspeed deepspeed.runtime.zero.muon.muon_optimizer diffusers.pipelines.stable_diffusion diffusers.models
    diffusers.models.unets.unet_2d_condition diffusers.schedulers transformers.models.clip torchmetrics
    matplotlib.pyplot rich.table rich.progress webdataset
"""
for heavy in HEAVY.split():
    importlib.import_module(heavy)
import accelerate  # noqa: E402, F401
from diffusers import AutoencoderDC, AutoencoderKL, SanaTransformer2DModel, UNet2DConditionModel  # noqa: E402, F401
from transformers import CLIPTextModel, CLIPTokenizer, Gemma2Model  # noqa: E402, F401


def receive(client: socket.socket) -> tuple[dict, list[int]]:
    """A request and the standard streams of its process."""
    text, streams, _, _ = socket.recv_fds(client, 1 << 16, 3)
    while not text.endswith(b"\n"):
        text += client.recv(1 << 16)
    return json.loads(text), streams


def become(request: dict, streams: list[int]) -> None:
    """Turn this child process into the requested one; does not return."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.executable = request["python"]  # what it starts in turn is forked too
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    script, *arguments = request["arguments"]
    try:
        if arguments[:1] == ["sculpt_dist.experiments.warm"]:
            warm.main()
            sys.exit(0)
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


def answer(client: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.sendall(f"{number}\n".encode())


def begin(client: socket.socket, inherited: list[socket.socket]) -> int:
    """Fork the process that the client asks for. `inherited`: what it must close."""
    request, streams = receive(client)
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for other in inherited:
            other.close()
        become(request, streams)
    for stream in streams:
        os.close(stream)
    return pid


def serve(listener: socket.socket) -> None:
    """Answer requests until the tests end, which closes stdin."""
    clients: dict[int, socket.socket] = {}  # by the id of their process
    child_ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([listener, sys.stdin, child_ended, *clients.values()], [], [])
        if sys.stdin in ready:
            return
        if child_ended in ready:
            os.read(child_ended, 1 << 16)
        for pid, client in list(clients.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                answer(client, os.waitstatus_to_exitcode(status))
            elif client in ready:  # it has gone away
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            else:
                continue
            clients.pop(pid).close()
        if listener in ready:
            client, _ = listener.accept()
            pid = begin(client, [listener, client, *clients.values()])
            clients[pid] = client
            answer(client, pid)


gc.collect()
gc.freeze()  # what was imported stays for ever: a child's collector need not visit it, nor copy its pages
assert threading.active_count() == 1, "a process with threads cannot be forked safely"
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(sys.argv[1])
    listening.listen(64)
    print("ready", flush=True)
    serve(listening)
