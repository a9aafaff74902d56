"""Decides when the next checkpoint within a concept is due."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from sculpt_dist.engine.checkpoints.save import Saver


class CheckpointTimer:
    """Checkpoints come every `every` seconds, or less often where saving would take more than `share` of the time.

    One is due when training has gone on for `every` seconds since the last one, and seconds / share have passed since
    that one began, where `seconds` is what it took, whether training waited for it or it was written in the background.
    `every` 0: none is due.

    The first rank decides: its checkpoint takes as long as that of the slowest rank, for whose file it waits. On the
    other ranks none is due, so all save when any rank's is (see Engine.end_step).
    """

    def __init__(self, saver: Saver, every: float, share: float, log: Callable[[str], None]) -> None:
        """`log` is told once that checkpoints come less often than `every`."""
        self.saver, self.every, self.share, self.log = saver, every, share, log
        self._since, self._told = time.monotonic(), False

    def restart(self) -> None:
        """Count from now: a concept begins."""
        self._since = time.monotonic()

    def due(self) -> bool:
        """Whether this rank finds a checkpoint due."""
        if not (self.every and self.saver.group.is_first) or self.saver.is_writing:
            return False
        now, seconds = time.monotonic(), self.saver.seconds
        is_wanted = now - max(self._since, self.saver.resumed) > self.every
        is_affordable = now - self.saver.began > seconds / self.share
        if is_wanted and not (is_affordable or self._told):
            self._told = True
            with contextlib.suppress(OSError):  # the other ranks are on their way to a collective
                self.log(
                    f"a checkpoint took {seconds:.3g} s: they come every {seconds / self.share:.3g} s instead of "
                    f"{self.every:g}, so that saving takes at most {self.share:.0%} of the time "
                    "(train.checkpoint_share)"
                )
        return is_wanted and is_affordable
