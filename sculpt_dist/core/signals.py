"""Signals that ask a run to stop, from the first moment of the process: importing torch and loading a model take a while."""

from __future__ import annotations

import signal
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
early: list[int] = []  # signals that came before a run began to listen


def catch_early_signals() -> None:
    """Note SIGTERM and SIGUSR1 instead of ending at once; the run stops as soon as it listens, and can be requeued."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    early.append(number)
