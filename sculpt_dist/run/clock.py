"""How the time of a step splits into its parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sculpt_dist.engine.group import Group


class Clock:
    """Times one step, from construction on. `with clock("forward"):` adds a block to that part.

    The block's collectives are counted as `reduce` instead, as measured by `Group.seconds_communicating`. Time outside
    all blocks, such as choosing candidates, appears only in `seconds`.

    This is host time without synchronisation. On a GPU the host only launches kernels, and waits once, at the end of
    `step`, where it reads what the step measured. So on a GPU `forward` and `backward` are launch time alone, and their
    computation appears in `step`.
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
        """Seconds since construction."""
        return time.perf_counter() - self._began

    def shares(self) -> dict[str, float]:
        """Each part's share of `seconds`, from 0 to 1."""
        total = self.seconds()
        return {part: round(seconds / total, 4) for part, seconds in self._parts.items()}
