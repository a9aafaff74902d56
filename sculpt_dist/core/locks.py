"""Locks between processes, also of several machines: a file that says who holds it and beats while the holder lives.

The kernel's flock decides among the processes of one machine. Some shared file systems have no flock, or one that
other machines do not see. There the file's content decides: it names the holder, and a count that the holder raises
every BEAT seconds. Who finds a holder waits for its next beat, and takes the lock when none comes in PATIENCE seconds.
No clock is compared. Of several takers, the last to write wins, and each looks again after SETTLE seconds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import sys
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

BEAT, PATIENCE, SETTLE = 2.0, 20.0, 1.0  # seconds
NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
SIZE = 1024  # bytes of the content, so that a write replaces all of it
LOST = 2  # exit code


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    host: str
    pid: int
    job: str  # in Slurm; or empty
    kernel: str  # of the machine since it was started
    token: str  # of the lock object
    beat: int = 0

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


class Lock:
    """A lock on a file, which stays when the lock is released. A `with` block waits for it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._me = Holder(
            platform.node()[:200], os.getpid(), os.environ.get("SLURM_JOB_ID", "")[:100], _kernel(), uuid.uuid4().hex
        )
        self._descriptor: int | None = None  # keeps the flock
        self._released = threading.Event()

    def acquire(self) -> str | None:
        """Take the lock if it is free or its holder is dead; returns None then, else who holds it."""
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            held = self._take(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if held is not None:
            os.close(descriptor)
            return held
        self._descriptor = descriptor
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return None

    def release(self) -> None:
        """Give the lock back; nothing if it is not held."""
        if self._descriptor is None:
            return
        self._released.set()
        holder = _read(self.file)
        if holder is not None and holder.token == self._me.token:
            with contextlib.suppress(OSError):
                os.truncate(self.file, 0)
        os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> Lock:
        while self.acquire() is not None:
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _take(self, descriptor: int) -> str | None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            has_flock = True
        except BlockingIOError:
            return str(_read(self.file) or "another process")
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            has_flock = False
        held = _read(self.file)
        is_settled = held is None or (
            has_flock and held.kernel == self._me.kernel
        )  # then the kernel knows that it died
        if held is not None and not is_settled and _lives(self.file, held):
            return str(held)
        self._released.clear()
        self._write()
        if has_flock:
            return None
        time.sleep(SETTLE)
        now = _read(self.file)
        return None if now is not None and now.token == self._me.token else str(now or "another process")

    def _write(self) -> None:
        self._me = replace(self._me, beat=self._me.beat + 1)
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, json.dumps(asdict(self._me)).encode().ljust(SIZE), 0)
        finally:
            os.close(descriptor)  # a network file system sends it now

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):  # a full disk or a removed folder: the writers of the run report it
                holder = _read(self.file)
                if holder is not None and holder.token != self._me.token and not self._released.is_set():
                    message = f"{self.file}: {holder} has taken over, because this process had stopped; it ends"
                    print(message, file=sys.stderr, flush=True)
                    os._exit(LOST)
                if holder is not None and not self._released.is_set():
                    self._write()


def _read(file: Path) -> Holder | None:
    """Who holds a lock by its content, or None."""
    try:
        return Holder(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _lives(file: Path, held: Holder) -> bool:
    """Whether a holder beats or another one comes, within PATIENCE seconds."""
    print(f"{file}: {held} holds it; waiting up to {PATIENCE:g} s for a sign of life", flush=True)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(BEAT / 4)
        now = _read(file)
        if now != held:
            return now is not None
    return False


def _kernel() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()
