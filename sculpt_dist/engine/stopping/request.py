"""Stop requests: a signal or a STOP file asks a run to stop, and all ranks agree to do so after the same step."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from sculpt_dist.core.errors import StopRequested
from sculpt_dist.core.files import append_line, writing
from sculpt_dist.core.signals import STOPPING, early, is_ignored
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.heartbeat import Heartbeat, describe_late, describe_silent

STOP_FILE, REQUEUE_FILE, LOG_FILE = "STOP", "REQUEUE", "log.txt"
TICK = 1.0  # seconds between checks for the stop file
CAUSE = "failed: "  # prefix of the log line that gives the cause of a failure
CRASHED, STOPPED = 1, 75


class StopRequest:
    """While open (`with`), a signal or a file `STOP` in the run folder asks all ranks to stop after their step.

    The signals are SIGINT, SIGTERM, SIGUSR1 and SIGHUP. Outside Python's main thread only the file is listened for.

    Python runs signal handlers only between two bytecodes, not while a rank waits in a collective. So a thread reads
    signals from the wake-up descriptor, without delay. If the ranks have not agreed within `grace` seconds, this rank
    exits and asks for a requeue; as soon as another rank sends no heartbeat, it exits as after a crash. The last
    checkpoint is kept in both cases. A second SIGINT ends the process. Leaving the context with StopRequested writes
    `REQUEUE` into the run folder.

    `late_after`: seconds that the others may wait for a rank in a collective before this ends the process, with the
    rank's name in the log. None leaves that to the backend, as gloo raises an error then.
    """

    def __init__(self, group: Group, folder: Path, grace: float = 60.0, late_after: float | None = None) -> None:
        self.group, self.folder, self.grace, self.late_after = group, folder, grace, late_after
        log = folder / LOG_FILE
        self._log_began = log.stat().st_size if log.exists() else 0  # before the barrier of the heartbeat
        self.requested, self.by_file, self.agreed_on = False, False, False
        self.failing = False  # an error ended the work; it will be reported, and the process will exit
        self.heartbeat = Heartbeat(group)
        self._since = time.monotonic()
        self._closing = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            heard = [number for number in STOPPING if not is_ignored(number)]
            self._before = {number: signal.signal(number, self._handle) for number in heard}
        self.requested = self.requested or bool(early)  # a signal that came before the handlers above were installed
        self._thread = threading.Thread(target=self._listen, name="stop-request", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is StopRequested:  # on all ranks
            # Write the mark first: once a rank exits, its launcher ends the others.
            if self.group.is_first:
                with writing(self.folder / REQUEUE_FILE):
                    (self.folder / REQUEUE_FILE).touch()
            self.group.barrier()
        self._closing.set()
        self.group.wait_for_work = None
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def accept(self, raised: tuple[bool, ...]) -> tuple[bool, ...]:
        """Note what the ranks have agreed: whether any was asked to stop, then further flags; returns all of it.

        From a stop on, the grace period no longer ends this process.
        """
        self.agreed_on = self.agreed_on or raised[0]
        return raised

    def check(self, where: str) -> None:
        """Raise StopRequested on all ranks when any was asked to stop. All ranks must call this."""
        own = torch.tensor([float(self.requested)], device=self.group.device)
        if self.accept((bool(self.group.max(own).item()),))[0]:
            raise self.stopped(where)

    def stopped(self, where: str) -> StopRequested:
        """The exception to raise once the ranks have agreed to stop."""
        first = f"remove {self.folder / STOP_FILE}, and " if self.by_file else ""
        return StopRequested(f"stopped at {where}; {first}run the same command to continue from here")

    def log_cause(self, cause: str) -> None:
        """Log the cause of a failure unless another rank has logged one since the work began."""
        log = self.folder / LOG_FILE
        with contextlib.suppress(OSError), log.open("rb") as file:
            file.seek(self._log_began)
            if CAUSE.encode() in file.read():
                return
        with contextlib.suppress(OSError):  # a full disk, say, which may be the cause: nothing hides it
            append_line(log, CAUSE + cause)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Python's signal handler; by the time it runs, the thread has noted the signal already."""
        self._note()
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])

    def _note(self) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()

    def _listen(self) -> None:
        while not self._closing.is_set():
            if select.select([self._reader], [], [], TICK)[0]:
                numbers = self._reader.recv(64)
                if not numbers:
                    return
                if any(number in numbers for number in STOPPING):
                    self._note()
            self.heartbeat.beat()
            if self.group.is_first and not self.requested and (self.folder / STOP_FILE).exists():
                self.by_file = True
                self._note()
            if self.late_after is not None and not self.failing and (late := self.heartbeat.late(self.late_after)):
                self.log_cause(f"{describe_late(late)}; seen by rank {self.group.rank}")
                os._exit(CRASHED)
            if self.requested and not (self.agreed_on or self.failing):
                self._exit_if_hopeless()

    def _exit_if_hopeless(self) -> None:
        """End this process when a rank is silent or the grace period is over."""
        waited = time.monotonic() - self._since
        silent = self.heartbeat.silent(self._closing)
        if self._closing.is_set() or self.agreed_on or self.failing or not (silent or waited > self.grace):
            return
        why = describe_silent(silent) if silent else f"no step has ended for {waited:.0f} s"
        message = (
            f"rank {self.group.rank}: asked to stop, and exited without saving: {why}; the last checkpoint is kept"
        )
        if silent:
            self.log_cause(message)
            os._exit(CRASHED)
        with contextlib.suppress(OSError):  # it ends in any case
            append_line(self.folder / LOG_FILE, message)
        with contextlib.suppress(OSError):
            (self.folder / REQUEUE_FILE).touch()
        os._exit(STOPPED)
