"""Heartbeats: after a failed collective, they tell a rank which other rank is dead or hung."""

from __future__ import annotations

import threading

import torch

from sculpt_dist.engine.group import Group

PATIENCE = 2.5  # seconds; a rank sends about one heartbeat a second


class Heartbeat:
    """Each rank reports through the rendezvous store that it is alive, and how many collectives it has entered.

    A single rank reports nothing. When the store is gone, so is the process that hosts it: rank 0, or the launcher on
    its node.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.count, self.broken = group, 0, False
        self.store = None if group.store is None else group.store.clone()  # a separate connection, for another thread
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

    def silent(self, given_up: threading.Event | None = None) -> list[int]:
        """Ranks without a heartbeat for `PATIENCE` seconds; takes that long. Only rank 0 when the store is gone.

        Once `given_up` is set, the answer is not wanted any more: returns an empty list at once.
        """
        if self.store is None:
            return []
        given_up = given_up or threading.Event()
        before = self._read()
        for _ in range(5):  # keep beating: the other ranks may be checking on this one
            if given_up.wait(PATIENCE / 5):
                return []
            self.beat()
        now = self._read()
        if before is None or now is None:
            return [0]
        return [rank for rank in range(self.group.size) if before[rank] == now[rank]]

    def culprit(self) -> str:
        """A message that names the rank for which the others were waiting."""
        silent = self.silent()
        if silent:
            return describe_silent(silent)
        entered = {rank: int(beat.split()[1]) for rank, beat in enumerate(self._read() or [])}
        late = [rank for rank, count in entered.items() if count == min(entered.values())]
        if entered and len(late) < len(entered):
            return f"{_ranks(late)} hangs or is slow: alive, but did not enter a collective that the others had entered"
        return "the connection broke, but every rank is alive"

    def _read(self) -> list[str] | None:
        """The last heartbeat of every rank; None when the store is gone."""
        if self.broken or self.store is None:
            return None
        try:
            return [beat.decode() for beat in self.store.multi_get([_key(rank) for rank in range(self.group.size)])]
        except torch.distributed.DistError:
            return None


def describe_silent(ranks: list[int]) -> str:
    """The message about ranks that sent no heartbeat."""
    return f"{_ranks(ranks)} died or was stopped (no heartbeat)"


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception only reports that another rank is gone or late: the cause is on that rank."""
    from_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return isinstance(error, torch.distributed.DistError) or from_gloo


def _key(rank: int) -> str:
    return f"sculpt-dist/life/{rank}"


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
