"""Heartbeats: they tell a rank which other rank is dead or hung, and which is at work on its own."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import torch

from sculpt_dist.engine.group import Group

PATIENCE = 2.5  # seconds; a rank sends about one heartbeat a second
FEW = 64  # heartbeats that a rank reads in a second, so that the store can serve a thousand ranks
PATIENCE_WITH_WORK = 4 * PATIENCE  # while a rank does work of its own, other processes may keep it from beating


class Heartbeat:
    """Each rank reports through the rendezvous store that it is alive, how many collectives it has entered, and whether
    it does work that the others wait for (`Group.on_first`, `Group.together`).

    A single rank reports nothing. When the store is gone, so is the process that hosts it: rank 0, or the launcher on
    its node.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.count, self.broken = group, 0, False
        self._pause = max(1.0, group.size / FEW)  # seconds between two readings of all heartbeats
        self._looked = -math.inf
        self.store = None if group.store is None else group.store.clone()  # a separate connection, for another thread
        self._entered: dict[int, tuple[int, float]] = {}  # rank -> collectives it has entered, and since when so many
        self.beat()
        group.barrier()
        group.wait_for_work = self.wait_for_work if self.store is not None else None

    def beat(self) -> None:
        if self.store is None or self.broken:
            return
        self.count += 1
        try:
            self.store.set(_key(self.group.rank), f"{self.count} {self.group.collectives} {int(self.group.working)}")
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
            return describe_late(late)
        return "the connection broke, but every rank is alive"

    def late(self, limit: float) -> list[int]:
        """Ranks that others have waited for in a collective for `limit` seconds, and that are not at work on their own.

        Call it again and again: it compares with what it read before. Between two readings the answer is none.
        """
        now = time.monotonic()
        if now - self._looked < self._pause:
            return []
        beats, self._looked = self._read() or [], now
        for rank, beat in enumerate(beats):
            _, collectives, working = map(int, beat.split())
            if working or self._entered.get(rank, (None, now))[0] != collectives:
                self._entered[rank] = collectives, now
        late = []
        for rank, (count, since) in self._entered.items():
            ahead = [entered for others, entered in self._entered.values() if others > count]
            if ahead and now - max(since, min(ahead)) > limit:
                late.append(rank)
        return late

    def wait_for_work(self, key: str) -> None:
        """Wait in the main thread until `key` is in the store.

        A rank that says that it is at work is waited for as long as its heart beats, others for the group's time limit.
        Then this returns, and the next collective tells what is wrong. Where no launcher ends the others, a rank that
        dies during such work is noticed after `PATIENCE_WITH_WORK`.
        """
        store, began = self.group.store, time.monotonic()
        beats: list[str] = []
        changed = [began] * self.group.size
        while True:
            until = time.monotonic() + self._pause
            try:
                while not (found := store.check([key])) and time.monotonic() < until:
                    time.sleep(0.01 * self._pause)  # `wait` with a time limit would print warnings
            except torch.distributed.DistError:
                return
            if found:
                return
            before, beats, now = beats, self._read(store) or [], time.monotonic()
            changed = [since if before[r : r + 1] == beats[r : r + 1] else now for r, since in enumerate(changed)]
            if any(beat.endswith(" 1") for beat in beats):
                began = now
            if not beats or now - began > self.group.timeout or now - min(changed) > PATIENCE_WITH_WORK:
                return

    def _read(self, store: Any = None) -> list[str] | None:
        """The last heartbeat of every rank; None when the store is gone. `store`: the connection of this thread."""
        store = store or self.store
        if self.broken or store is None:
            return None
        try:
            return [beat.decode() for beat in store.multi_get([_key(rank) for rank in range(self.group.size)])]
        except torch.distributed.DistError:
            return None


def describe_silent(ranks: list[int]) -> str:
    """The message about ranks that sent no heartbeat."""
    return f"{_ranks(ranks)} died or was stopped (no heartbeat)"


def describe_late(ranks: list[int]) -> str:
    """The message about ranks that live, and that the others wait for."""
    return f"{_ranks(ranks)} hangs or is slow: alive, but did not enter a collective that the others had entered"


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception only reports that another rank is gone or late: the cause is on that rank."""
    from_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return isinstance(error, torch.distributed.DistError) or from_gloo


def _key(rank: int) -> str:
    return f"sculpt-dist/life/{rank}"


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
