"""Starts calls of `sculpt-dist` by forking a process that has imported everything: imports take seconds of each.

`python -m sculpt_dist.experiments.warm` is that process. It reads requests from stdin, one JSON line each, {"number",
"arguments", "environment", "output"}, and answers on stdout: `NUMBER PID`, later `NUMBER EXIT_CODE` (minus the signal's
number if one killed it). When stdin ends, so does it, and its children receive SIGTERM. It touches no device and starts
no thread, with which it could not be forked safely.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import Any

from sculpt_dist.core.signals import STOPPING

WHAT_A_RUN_IMPORTS = """
    sculpt_dist.cli.main sculpt_dist.run.stages sculpt_dist.run.sequence sculpt_dist.report.page
    sculpt_dist.backbones.sd15 sculpt_dist.backbones.sdxl sculpt_dist.backbones.sana
    deepspeed deepspeed.runtime.zero.muon.muon_optimizer accelerate webdataset torchmetrics matplotlib.pyplot
    rich.table rich.progress diffusers.models.autoencoders diffusers.models.unets.unet_2d_condition diffusers.schedulers
    diffusers.models.transformers.sana_transformer diffusers.pipelines.stable_diffusion transformers.models.clip
    transformers.models.gemma2
""".split()  # one that is missing here costs time only
KILLED = -signal.SIGKILL


class WarmParent:
    """The process that forks, seen from the one that started it. Any thread may use it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "sculpt_dist.experiments.warm"],
            env=dict(environment) | {"OPENBLAS_NUM_THREADS": "1"},  # or numpy would start threads
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._lock, self._ended = threading.Lock(), False
        self._answers: list[SimpleQueue[int]] = []  # of each request
        threading.Thread(target=self._read_answers, daemon=True).start()

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> WarmProcess | None:
        """Start `sculpt-dist ARGUMENTS`; None where the process that forks is gone."""
        output = tempfile.NamedTemporaryFile("r", errors="replace", suffix=".txt")  # noqa: SIM115 (WarmProcess closes it)
        with self._lock:
            answers: SimpleQueue[int] = SimpleQueue()
            request = {"number": len(self._answers), "arguments": list(arguments), "environment": dict(environment)}
            self._answers.append(answers)
            assert self._server.stdin is not None
            try:
                self._server.stdin.write(json.dumps(request | {"output": output.name}) + "\n")
                self._server.stdin.flush()
            except BrokenPipeError:
                return None
            if self._ended:
                answers.put(KILLED)
        pid = answers.get()
        return None if pid == KILLED else WarmProcess(pid, answers, output)

    def close(self) -> None:
        """End the process; children that still run receive SIGTERM."""
        assert self._server.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._server.stdin.close()
        self._server.wait()

    def _read_answers(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            number, value = map(int, line.split())
            self._answers[number].put(value)
        with self._lock:
            self._ended = True
            for answers in self._answers:
                answers.put(KILLED)


class WarmProcess:
    """A call of `sculpt-dist`, used as the `subprocess.Popen` of one."""

    def __init__(self, pid: int, answers: SimpleQueue[int], output: Any) -> None:
        self._pid, self._answers, self._output = pid, answers, output
        self.returncode = 0

    def send_signal(self, number: int) -> None:
        """Nothing once the process has ended."""
        if self._pid > 0:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def communicate(self) -> tuple[str, None]:
        """Wait for the end; returns what was printed."""
        self.returncode, self._pid = self._answers.get(), KILLED
        with self._output as file:
            return file.read(), None


def serve(answers: int) -> dict[str, Any] | None:
    """Fork a child for every request. Returns the request in a child, and None here when stdin has ended.

    A child's stop signals are blocked; `answers` is the descriptor to answer on.
    """
    waiting, children = b"", dict[int, int]()
    while True:
        while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            os.write(answers, f"{children.pop(ended[0])} {os.waitstatus_to_exitcode(ended[1])}\n".encode())
        if not select.select([0], [], [], 0.05)[0]:
            continue
        received = os.read(0, 1 << 16)
        if not received:
            return None
        *lines, waiting = (waiting + received).split(b"\n")
        for request in map(json.loads, lines):
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # the child gets one as soon as it can obey it
            pid = os.fork()
            if pid == 0:
                os.close(answers)
                return dict(request)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
            children[pid] = request["number"]
            os.write(answers, f"{request['number']} {pid}\n".encode())


def become(request: Mapping[str, Any], parent: int) -> None:
    """Turn this child into the requested call."""
    import torch

    os.setsid()
    with contextlib.suppress(AttributeError, OSError):  # Linux only
        set_parent_death_signal = 1  # prctl's PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:
        return  # it died before that
    os.environ.clear()
    os.environ.update(request["environment"])
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    for stream, place in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(stream, place)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    sys.argv = ["sculpt-dist", *request["arguments"]]
    runpy.run_module("sculpt_dist", run_name="__main__")


def main() -> None:
    """What `python -m sculpt_dist.experiments.warm` does."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}  # its children get and obey them
    os.environ |= {"DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "warning"}
    for name in WHAT_A_RUN_IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a child's collector then need not visit what was imported, nor copy its pages
    parent = os.getpid()
    request = serve(answers)
    if request is not None:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        become(request, parent)


if __name__ == "__main__":
    main()
