"""Client of workers/forking.py: starts a process there. It imports little, for the stand-in for Python that uses it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SET_BY_LIBRARIES = (  # when they are imported; LC_CTYPE by Python itself
    "LC_CTYPE PYTEST_CURRENT_TEST LOCAL_RANK DS_ACCELERATOR DEEPSPEED_LOG_LEVEL TORCH_EXTENSIONS_DIR "
    "PYTORCH_NVML_BASED_CUDA_CHECK "
    "DIFFUSERS_VERBOSITY TRANSFORMERS_VERBOSITY TORCHINDUCTOR_CACHE_DIR WANDB_ERROR_REPORTING"
).split()
READ_LATE = (
    "LOCAL_",
    "MASTER_",
    "PYTHONPATH",
    "RANK",
    "SCULPT_",
    "TORCH_ELASTIC",
    "WORLD_SIZE",
    "WANDB_",
)  # not by an import


class Forked:
    """A process that was started by forking; `pid` is its process id."""

    def __init__(
        self, server: str, arguments: Sequence[str], environment: Mapping[str, str], streams: tuple[int, int, int]
    ) -> None:
        """`server`: the folder of the running server. `streams`: stdin, stdout and stderr."""
        request = {
            "arguments": list(arguments),
            "environment": dict(environment),
            "folder": os.getcwd(),
            "python": os.path.join(server, "python"),
        }
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(os.path.join(server, "socket"))
        content = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(self._socket, [content], list(streams))
        self._socket.sendall(content[sent:])
        self._received = b""
        self._next_line(None)
        self.pid = int(self._taken())
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code, or minus the number of the signal that killed it; None while it runs."""
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> int | None:
        """The same, after at most so many seconds; without a limit if None."""
        if self.returncode is None and self._next_line(timeout):
            self.returncode = int(self._taken())
        return self.returncode

    def _next_line(self, timeout: float | None) -> bool:
        """Whether the server's next answer has come."""
        while b"\n" not in self._received:
            if not select.select([self._socket], [], [], timeout)[0]:
                return False
            received = self._socket.recv(1 << 10)
            if not received:
                raise ConnectionError("the server that forks processes has ended")
            self._received += received
        return True

    def _taken(self) -> bytes:
        line, _, self._received = self._received.partition(b"\n")
        return line


def is_forkable(environment: Mapping[str, str], of_server: Mapping[str, str]) -> bool:
    """Whether they agree in all that libraries read when they are imported."""
    changed = {name for name in {*environment, *of_server} if environment.get(name) != of_server.get(name)}
    return all(name in SET_BY_LIBRARIES or name.startswith(READ_LATE) for name in changed)


def stand_in(server: str, python: str, arguments: Sequence[str]) -> None:
    """What the stand-in for Python does: start the process, pass signals on to it, end as it ends."""
    with open(os.path.join(server, "environment.json")) as file:
        of_server = json.load(file)
    module = arguments[1] if arguments[0] == "-m" else ""
    known = module in ("sculpt_dist", "sculpt_dist.experiments.warm") or arguments[0].endswith(".py")
    if not known or not is_forkable(os.environ, of_server):
        os.execv(python, [python, *arguments])
    waiting: list[int] = []
    for number in FORWARDED:
        signal.signal(number, lambda number, _: waiting.append(number))
    process = Forked(server, arguments, os.environ, (0, 1, 2))
    for number in FORWARDED:
        signal.signal(number, lambda number, _: process.send_signal(number))
    for number in waiting:
        process.send_signal(number)
    code = process.wait()
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
