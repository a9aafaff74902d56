"""Stop signals that arrive before a run can handle them: importing torch and loading a model take a while."""

from __future__ import annotations

import signal
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # the last: its terminal was closed
early: list[int] = []  # signals that arrived before a run listened for them


def catch_early_signals() -> None:
    """Record a signal instead of exiting at once; the run stops as soon as it can, and can be requeued.

    Until the run listens, Ctrl-C ends it at once.
    """
    for number in STOPPING:
        if not is_ignored(number):
            signal.signal(number, _note)


def is_ignored(number: int) -> bool:
    """Whether a closed terminal is to be ignored, as nohup asks for."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def _note(number: int, frame: FrameType | None) -> None:
    early.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
