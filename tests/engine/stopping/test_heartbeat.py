"""Whom the heartbeats name as late: a rank that others wait for, from when they began to wait."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sculpt_dist.engine.stopping import heartbeat
from sculpt_dist.engine.stopping.heartbeat import Heartbeat

ENTERED, WORKS = 0, 1


@pytest.fixture
def observe(monkeypatch):
    """observe(seconds, (collectives, works) of each rank): the ranks that are late by 4 s, as seen at that time."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock.now)
    group = SimpleNamespace(store=None, rank=0, size=2, barrier=lambda: None)
    observer = Heartbeat(group)

    def at(seconds: float, *ranks: tuple[int, int]) -> list[int]:
        clock.now = seconds
        monkeypatch.setattr(observer, "_read", lambda: [f"1 {count} {works}" for count, works in ranks])
        return observer.late(4.0)

    return at


def test_a_rank_is_late_once_others_have_waited_in_a_collective_for_longer_than_the_limit(observe):
    assert observe(0, (5, ENTERED), (5, ENTERED)) == []
    assert observe(1, (6, ENTERED), (5, ENTERED)) == []
    assert observe(4, (6, ENTERED), (5, ENTERED)) == []
    assert observe(6, (6, ENTERED), (5, ENTERED)) == [1]
    assert observe(7, (6, ENTERED), (6, ENTERED)) == []


def test_a_rank_that_waited_for_the_work_of_another_is_not_late_when_the_other_enters_a_collective_first(observe):
    assert observe(0, (5, WORKS), (5, ENTERED)) == []
    assert observe(8, (5, WORKS), (5, ENTERED)) == []
    assert observe(9, (6, ENTERED), (5, ENTERED)) == []  # the next heartbeat of rank 1 will say 6
    assert observe(14, (6, ENTERED), (5, ENTERED)) == [1]


def test_a_rank_at_work_is_not_late_however_long_it_takes(observe):
    assert observe(0, (6, ENTERED), (5, WORKS)) == []
    assert observe(100, (6, ENTERED), (5, WORKS)) == []
    assert observe(103, (6, ENTERED), (5, ENTERED)) == []
    assert observe(105, (6, ENTERED), (5, ENTERED)) == [1]


def test_heartbeats_of_many_ranks_are_read_less_often(monkeypatch):
    clock, reads = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock.now)
    observer = Heartbeat(SimpleNamespace(store=None, rank=0, size=1024, barrier=lambda: None))
    monkeypatch.setattr(observer, "_read", lambda: reads.append(clock.now) or ["1 5 0"] * 1024)
    for clock.now in range(64):
        assert observer.late(100.0) == []
    assert reads == [0, 16, 32, 48]  # 64 heartbeats a second
