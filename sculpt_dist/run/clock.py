"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sculpt_dist.engine.group import Group


class Clock:
    """Runs from its making; `with clock("forward"):` counts the block to that part, but for its collectives, which are
    `reduce`.

    It is this host's time and synchronises nothing. On a GPU the host only launches, and waits where a number is read:
    for the forward at the finite check of the loss (in `forward`), for the backward at the norm of the gradient (in
    `step`). So there `backward` is the time of its launching, its computing shows up in `step`, and `reduce` is what
    `Group.seconds_communicating` says. What no block holds (choosing candidates, for one) is in `seconds` alone.
    """

    def __init__(self, group: Group) -> None:
        self._group, self._began = group, time.perf_counter()
        self._parts: dict[str, float] = {"reduce": 0.0}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began, sent = time.perf_counter(), self._group.seconds_communicating
        yield
        sent = self._group.seconds_communicating - sent
        self._parts["reduce"] += sent
        self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - began - sent

    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self._began

    def shares(self) -> dict[str, float]:
        """Each part's share of `seconds`, from 0 to 1."""
        total = self.seconds()
        return {part: round(seconds / total, 4) for part, seconds in self._parts.items()}
