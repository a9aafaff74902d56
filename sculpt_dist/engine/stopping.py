"""Being asked to stop: signals set a flag, and the ranks agree on it at the same point of the work."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch

from sculpt_dist.engine.group import Group
from sculpt_dist.errors import StopRequested

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While open (`with`), the first SIGINT, SIGTERM or SIGUSR1 is noted instead of ending the process; a second one ends it."""

    def __init__(self, group: Group) -> None:
        self.group, self.came = group, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; all ranks enter."""
        return bool(self.group.max(torch.tensor([float(self.came)], device=self.group.device)).item())

    def check(self, where: str) -> None:
        """Raise StopRequested on all ranks when any was asked to stop; all ranks enter."""
        if self.agreed():
            raise StopRequested(f"stopped at {where}; the same command goes on from here")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
