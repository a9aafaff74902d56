"""Signs of life: how a rank learns which other rank is dead or hangs, when a collective has failed."""

from __future__ import annotations

import time

import torch

from sculpt_dist.engine.group import Group

PATIENCE = 2.5  # seconds; a rank beats about once a second


class Heartbeat:
    """Every rank tells the others, through the ranks' meeting point, that it lives and how many collectives it has entered.

    Alone there is nobody to tell. When the meeting point is gone, its holder (rank 0, or the launcher on its node) is.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.count, self.broken = group, 0, False
        self.store = None if group.store is None else group.store.clone()  # a connection of its own, for another thread
        self.beat()
        group.barrier()

    def beat(self) -> None:
        if self.store is None or self.broken:
            return
        self.count += 1
        try:
            self.store.set(_key(self.group.rank), f"{self.count} {self.group.collectives}")
        except torch.distributed.DistError:
            self.broken = True

    def silent(self) -> list[int]:
        """Ranks that gave no sign of life for `PATIENCE` seconds, which this takes; only 0 when the meeting point is gone."""
        if self.store is None:
            return []
        before = self._read()
        for _ in range(5):  # meanwhile the others may be asking the same about this rank
            time.sleep(PATIENCE / 5)
            self.beat()
        now = self._read()
        if before is None or now is None:
            return [0]
        return [rank for rank in range(self.group.size) if before[rank] == now[rank]]

    def culprit(self) -> str:
        """Which rank the others were waiting for, in words."""
        silent = self.silent()
        if silent:
            return describe_silent(silent)
        entered = {rank: int(told.split()[1]) for rank, told in enumerate(self._read() or [])}
        late = [rank for rank, count in entered.items() if count == min(entered.values())]
        if entered and len(late) < len(entered):
            return f"{_ranks(late)} hangs or is slow: it lives, but did not come to a collective that the others had entered"
        return "the connection broke, but every rank lives"

    def _read(self) -> list[str] | None:
        if self.broken or self.store is None:
            return None
        try:
            return [told.decode() for told in self.store.multi_get([_key(rank) for rank in range(self.group.size)])]
        except torch.distributed.DistError:
            return None


def describe_silent(ranks: list[int]) -> str:
    """What is known of ranks that gave no sign of life, in words."""
    return f"{_ranks(ranks)} died or was stopped (no sign of life)"


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception only says that another rank is gone or late, so that the cause lies there."""
    told = str(error)
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in told)


def _key(rank: int) -> str:
    return f"sculpt-dist/life/{rank}"


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
