"""What a save costs: each byte is written once and read never, and saving takes a bounded share of the time."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from harness import ONE_STEP, PROJECT, launch
from runs import bytes_read, lines

from sculpt_dist.core.files import file_sha256
from sculpt_dist.core.tensorfile import Entry, TensorWriter
from sculpt_dist.engine.checkpoints import restore
from sculpt_dist.engine.checkpoints import save as saving
from sculpt_dist.engine.checkpoints.save import Saver
from sculpt_dist.engine.checkpoints.timer import CheckpointTimer
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.sharding import Fragment, Shard


@pytest.fixture(scope="module")
def group() -> Group:
    return Group(60)


def shard_of(size: int) -> Shard:
    half = size // 2
    return Shard(torch.nn.Parameter(torch.randn(size)), [Fragment("a", 0, 0, 0, half), Fragment("b", 1, 0, half, half)])


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_is_not_read_again_for_its_checksums(group, tmp_path, background):
    shard, before = shard_of(1_000_000), bytes_read()
    with Saver(tmp_path, group, background) as saver:
        saver.save((0, 1), [shard], {"teacher": [shard.flat.clone()]}, {})
    read, file = bytes_read() - before, tmp_path / "step-000-000001" / "rank-0.safetensors"
    assert file.stat().st_size > 21_000_000 and read < 20_000
    body = json.loads(json.loads((file.parent / "manifest.json").read_text())["body"])
    assert body["files"][file.name] == {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    assert restore.verify(file.parent) == ({}, None)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 1, 0, 3], [1, 0, 4, 2, 3]])
def test_the_checksum_is_right_in_whatever_order_tensors_arrive(tmp_path, order):
    kinds = (torch.float32, torch.uint8, torch.float32, torch.bfloat16, torch.float32)
    tensors = [(f"{i}", torch.arange(1000 * i).to(kind)) for i, kind in enumerate(kinds)]  # the first is empty
    writer = TensorWriter(tmp_path / "x", [Entry(name, value.dtype, tuple(value.shape)) for name, value in tensors])
    for i in order:
        writer.write(*tensors[i])
    assert writer.finish() == file_sha256(tmp_path / "x")


class Slow:
    """A clock that stands still but for what is waited for, and a writer that takes its time by it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.now, self.seconds = 1000.0, seconds
        write = saving._write_part

        def write_slowly(*given):
            self.now += self.seconds
            return write(*given)

        monkeypatch.setattr(saving, "_write_part", write_slowly)
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr("sculpt_dist.engine.checkpoints.save.time", clock)
        monkeypatch.setattr("sculpt_dist.engine.checkpoints.timer.time", clock)


def saves(timer: CheckpointTimer, saver: Saver, slow: Slow, steps: int, seconds: float) -> Iterator[int]:
    """The steps after which a checkpoint is saved."""
    shard = shard_of(10)
    for step in range(steps):
        slow.now += seconds
        if timer.due():
            saver.save((0, step), [shard], {}, {})
            saver.finish()
            yield step


@pytest.mark.parametrize("background", [True, False])
def test_saving_takes_at_most_its_share_of_the_time_and_the_log_says_so_once(group, tmp_path, monkeypatch, background):
    slow, told = Slow(monkeypatch, 30.0), []
    saver = Saver(tmp_path / "run", group, background)
    timer = CheckpointTimer(saver, 60.0, 0.05, told.append)
    steps, begins = [], []
    for step in saves(timer, saver, slow, 3000, 1.0):
        steps.append(step)
        begins.append(saver.began)
    assert steps == [60, 631, 1202, 1773, 2344, 2915]  # 601 s apart, 30 s of which were the save
    assert (len(steps) - 1) * 30 / (begins[-1] - begins[0]) == 30 / 601 < 0.05
    assert told == [
        "a checkpoint took 30 s: they come every 600 s instead of 60, so that saving takes at most 5% of the time "
        "(train.checkpoint_share)"
    ]
    slow.seconds = 0.5  # the disk is fast again
    steps = list(saves(timer, saver, slow, 2000, 1.0))
    assert {b - a for a, b in pairwise(steps[1:])} == {61} and len(told) == 1


def test_checkpoints_come_as_often_as_asked_where_that_is_cheap_or_unlimited_and_zero_means_never(
    group, tmp_path, monkeypatch
):
    slow, told = Slow(monkeypatch, 0.5), []
    saver = Saver(tmp_path / "run", group, background=False)

    def count(every: float, share: float) -> int:
        return len(list(saves(CheckpointTimer(saver, every, share, told.append), saver, slow, 600, 1.0)))

    assert count(60.0, 0.05) == 9
    slow.seconds = 1000.0
    assert count(60.0, 1.0) == 9
    assert count(0.0, 0.05) == 0 and not told
    assert {path.name for path in (tmp_path / "run").glob("step-*")} == {"step-000-000548", "step-000-000487"}


def test_a_concept_counts_from_its_begin_and_only_the_first_rank_decides(tmp_path, monkeypatch, group):
    slow = Slow(monkeypatch, 0.0)
    saver = Saver(tmp_path / "run", group)
    timer = CheckpointTimer(saver, 60.0, 0.05, print)
    slow.now += 1000
    timer.restart()
    assert not timer.due()
    slow.now += 61
    assert timer.due()
    monkeypatch.setattr(saver, "group", SimpleNamespace(is_first=False))
    assert not timer.due()


def test_no_checkpoint_is_due_while_one_is_being_written(group, tmp_path, monkeypatch):
    write = saving._write_part
    monkeypatch.setattr(saving, "_write_part", lambda *given: time.sleep(0.3) or write(*given))
    with Saver(tmp_path / "run", group) as saver:
        timer = CheckpointTimer(saver, 0.001, 1.0, print)
        saver.save((0, 1), [shard_of(10)], {}, {})
        time.sleep(0.05)
        assert saver.is_writing and not timer.due()
        saver.finish()
        assert not saver.is_writing and 0.3 < saver.seconds < 1.0


@pytest.mark.two_ranks
def test_all_ranks_save_after_the_same_steps_though_one_of_them_has_a_slow_disk(canvas_config, tmp_path):
    given = [*ONE_STEP, "train.steps=20", "train.checkpoint_every=0.001", f"run.folder={tmp_path / 'run'}"]
    printed = launch(2, str(PROJECT / "tests" / "workers" / "slow_disk.py"), canvas_config, *given)
    saved = [re.findall(rf"rank {rank} saves .writing-(.*)", printed) for rank in (0, 1)]
    seconds = sum(entry["seconds"] for entry in lines(tmp_path / "run"))
    assert saved[0] == saved[1] and saved[0][0] == "000-000001" and saved[0][-1] == "001-000000"
    assert len(saved[0]) <= 2 + seconds / 4  # the first, the last, and one every 4 s
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("so that saving takes at most 5% of the time") == 1
    took, every = map(float, re.search(r"took (.*) s: they come every (.*) s instead of 0.001", log).groups())
    assert took >= 0.2 and every == pytest.approx(took / 0.05, rel=0.01)
