"""Whole runs on four and eight ranks: the same samples, images, masks and weights as on one; elastic; one rank slow.

The batches of samples and of images divide evenly among none of these numbers of ranks.
"""

from __future__ import annotations

import os
import signal
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from harness import PROJECT, SMALL, Ranks, launch, sculpt, weights
from runs import lines, wait_for_step
from safetensors.torch import load_file

from sculpt_dist.core.files import file_sha256

RUN = [
    *SMALL,
    "model.arch=sana",
    "concepts=[{target: bird, superclass: animal}]",
    "prepare.samples=9",  # of each of two sources, in batches of 4, 4 and 1
    "prepare.batch=4",
    "prepare.steps=2",
    "train.batch=8",
    "train.steps=10",
    "train.checkpoint_every=0",
    "evaluate.objects=[bird,boat]",
    "evaluate.styles=[neon]",
    "evaluate.images=3",  # with one of each paraphrase: batches of 4, 4 and 2
    "evaluate.batch=4",
]
pytestmark = [pytest.mark.slow, pytest.mark.two_ranks]


@pytest.fixture(scope="module")
def run_on(tmp_path_factory, canvas_config):
    """The folder of a run on a number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")

    @cache
    def run(ranks: int) -> Path:
        sculpt("unlearn", canvas_config, *RUN, f"run.folder={folder / str(ranks)}", ranks=ranks)
        return folder / str(ranks)

    return run


def opened(run: Path) -> dict[str, torch.Tensor]:
    """The mask at the end: for each matrix whether its weights are open, put together from the ranks' parts."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    newest = max((run / "checkpoints").glob("step-*"))
    for file in newest.glob("rank-*.safetensors"):
        for key, tensor in load_file(file).items():
            kind, name, start = key.split("|")
            if kind == "opened":
                parts.setdefault(name, {})[int(start)] = tensor > 0
    return {name: torch.cat([pieces[start] for start in sorted(pieces)]) for name, pieces in parts.items()}


def assert_alike(run: Path, expected: Path) -> None:
    """Equal up to the order of sums, with the tolerances of test_laws.py: a weight whose mask flips in a near tie
    differs by up to lr a step.
    """
    losses = [[entry["loss"] for entry in lines(folder)] for folder in (run, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert [entry.get("open") for entry in lines(run)] == [entry.get("open") for entry in lines(expected)]
    masks, other_masks = opened(run), opened(expected)
    assert masks.keys() == other_masks.keys() and len(masks) > 0
    flipped = torch.cat([masks[name] != other_masks[name] for name in masks])
    assert float(flipped.float().mean()) <= 1e-3
    a, b = weights(run), weights(expected)
    moved = [(a[name] - b[name]).abs().flatten() for name in a if not torch.equal(a[name], b[name])]
    assert not moved or float((torch.cat(moved) > 1e-4).float().mean()) <= 1e-3


@pytest.mark.parametrize("ranks", [4, 8])
def test_a_run_on_many_ranks_equals_that_on_one(run_on, ranks):
    run, alone = run_on(ranks), run_on(1)
    shards = sorted(file.relative_to(alone) for file in (alone / "data").rglob("*.tar"))
    assert len(shards) == 6
    assert all(file_sha256(run / shard) == file_sha256(alone / shard) for shard in shards)
    drawn = [file_sha256(folder / "evaluation" / "before" / "images.csv") for folder in (run, alone)]
    assert drawn[0] == drawn[1]
    assert_alike(run, alone)


def test_a_run_continues_on_four_two_and_eight_ranks_to_the_same_weights(run_on, canvas_config, tmp_path):
    folder = tmp_path / "run"
    for ranks, step in ((4, 3), (2, 7)):
        command = ["unlearn", canvas_config, *RUN, f"run.folder={folder}"]
        started = Ranks(ranks, "-m", "sculpt_dist", *command, output=tmp_path / "out.txt")
        wait_for_step(folder, started, 0, step)
        for pid in started.pids:
            os.kill(pid, signal.SIGTERM)
        assert set(started.wait(60)) == {75}, (tmp_path / "out.txt").read_text()
        assert not (folder / "model").exists()
    sculpt("unlearn", canvas_config, *RUN, f"run.folder={folder}", ranks=8)
    assert [entry["step"] for entry in lines(folder)] == list(range(12))
    log = (folder / "log.txt").read_text()
    assert [f"began on {ranks} rank(s)" in log for ranks in (4, 2, 8)] == [True] * 3 and log.count("resumes from") == 2
    assert_alike(folder, run_on(1))


def test_a_rank_that_is_ten_times_slower_is_waited_for(run_on, canvas_config, tmp_path):
    script, folder = str(PROJECT / "tests" / "workers" / "slow_rank.py"), tmp_path / "run"
    expected = weights(run_on(4))
    began = time.monotonic()
    launch(4, script, "2", "5", canvas_config, *RUN, f"run.folder={folder}")
    assert time.monotonic() - began > 5  # so that all waiting together would have been too long
    found, log = weights(folder), (folder / "log.txt").read_text()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "failed" not in log and "heartbeat" not in log and log.rstrip().endswith("done")
