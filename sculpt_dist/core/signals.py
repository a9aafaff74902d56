"""Stop signals that arrive before a run can handle them: importing torch and loading a model take a while."""

from __future__ import annotations

import signal
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
early: list[int] = []  # signals that arrived before a run listened for them


def catch_early_signals() -> None:
    """Record SIGTERM and SIGUSR1 instead of exiting at once; the run stops as soon as it can, and can be requeued."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    early.append(number)
