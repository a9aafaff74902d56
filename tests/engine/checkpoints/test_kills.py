"""Runs that are killed at random moments and resumed end with the weights of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from harness import PROJECT, SMALL, Ranks, sculpt, weights
from runs import passes

from sculpt_dist.core.files import file_sha256

RUN = [*SMALL, "model.arch=sana", "evaluate.enabled=false", "train.steps=10", "prepare.samples=4", "prepare.steps=2"]
RUN += ["train.checkpoint_share=1"]
CELLS = [(1, 0), (2, 1), (1, 2), (1, 3), (2, 3), (2, 0), (1, 1), (2, 2)]  # (ranks, stage); the first five are CI's
WAYS = ("TERM", "USR1", "STOP file", "KILL all", "KILL one")


def arguments(canvas_config: str, folder: Path, stage: int) -> list[str]:
    pulled = [f"train.l2sp={int(stage == 2)}"]  # towards weights that a resumed run has to find again
    return ["unlearn", canvas_config, *RUN, *pulled, f"engine.stage={stage}", f"run.folder={folder}"]


def straight(canvas_config: str, folder: Path, cells: Sequence[tuple[int, int]]) -> tuple[Path, dict]:
    """(the samples; for each number of ranks and stage: weights of an undisturbed run, its passes and its seconds)."""
    sculpt("prepare", canvas_config, *RUN, f"run.folder={folder / 'drawn'}")

    def run(cell: tuple[int, int]) -> tuple[dict[str, torch.Tensor], dict[str, int], float]:
        ranks, stage = cell
        place = folder / f"{ranks}-{stage}"
        shutil.copytree(folder / "drawn" / "data", place / "data")
        began = time.monotonic()
        sculpt(*arguments(canvas_config, place, stage), ranks=ranks)
        return weights(place), passes(place), time.monotonic() - began

    return folder / "drawn" / "data", dict(zip(cells, on_both_cores(run, cells, lambda cell: cell[0])))


def on_both_cores(work: Callable, items: Sequence, ranks: Callable) -> list:
    """The results of all items, in order; those that take one rank run two at a time."""
    with ThreadPoolExecutor(2) as pool:
        alone = {i: pool.submit(work, item) for i, item in enumerate(items) if ranks(item) == 1}
    return [alone[i].result() if i in alone else work(item) for i, item in enumerate(items)]


def wait_for_step(folder: Path, pids: list[int], concept: int, step: int) -> None:
    """Wait until the step is logged, or the ranks have ended."""
    file = folder / "metrics.jsonl"
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        lines = file.read_text().splitlines()[:-1] if file.exists() else []  # the last one may be incomplete
        if any((entry["concept"], entry["step"]) >= (concept, step) for entry in map(json.loads, lines)):
            return
        time.sleep(0.01)


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    "kills", [pytest.param(len(WAYS), marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.exhaustive)]
)
def test_runs_killed_at_random_moments_end_bit_identical(canvas_config, tmp_path, kills):
    drawn, done = straight(canvas_config, tmp_path / "straight", CELLS[:kills])

    def kill_and_resume(number: int) -> tuple[str, list[int], str]:
        (ranks, stage), way = CELLS[number % len(CELLS)], WAYS[number % len(WAYS)]
        rng, (expected, counted, seconds) = random.Random(f"kill {number}"), done[ranks, stage]
        folder = tmp_path / str(number)
        shutil.copytree(drawn, folder / "data")
        call = [*arguments(canvas_config, folder, stage), f"train.checkpoint_every={rng.choice([0, 0.01, 0.5])}"]
        started = Ranks(ranks, "-m", "sculpt_dist", *call, output=tmp_path / f"{number}.txt")
        pids = started.pids
        if number % 4 == 0:  # any moment of the run, including its start, drawing and export
            time.sleep(rng.uniform(0.1, 0.95) * seconds)
        else:  # a moment of training
            wait_for_step(folder, pids, rng.randrange(2), rng.randrange(12))
            time.sleep(rng.uniform(0, 0.05))
        for pid in [rng.choice(pids)] if way == "KILL one" else pids:
            if way == "STOP file":
                (folder / "STOP").touch()
            elif Path(f"/proc/{pid}").exists():
                os.kill(pid, getattr(signal, f"SIG{way.split()[0]}"))
        codes = started.wait(120)
        printed = (tmp_path / f"{number}.txt").read_text()
        stopped = sorted((folder / "checkpoints").glob("step-*"))
        if way in ("TERM", "USR1", "STOP file"):
            assert set(codes) <= {0, 75, -signal.SIGTERM, -signal.SIGUSR1}, printed
            assert (75 in codes) == (folder / "REQUEUE").exists(), printed
        (folder / "STOP").unlink(missing_ok=True)
        sculpt(*call, ranks=ranks)
        found = weights(folder)
        place = (way, codes, stopped[-1].name if stopped else "no checkpoint")
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found), (
            place,
            ranks,
            stage,
        )
        steps = [
            (entry["concept"], entry["step"])
            for entry in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        ]
        assert set(steps) == {(concept, step) for concept in range(2) for step in range(12)}
        if way in ("TERM", "USR1", "STOP file") and 75 in codes:
            assert len(steps) == len(set(steps)), "a step saved on a signal was repeated"
        assert passes(folder) == counted, (place, ranks, stage)
        shutil.rmtree(folder)
        return place

    reached = on_both_cores(kill_and_resume, range(kills), lambda number: CELLS[number % len(CELLS)][0])
    print(*reached, sep="\n")
    assert sum(any(codes) for _, codes, _ in reached) >= kills * 2 // 3, (
        f"too few runs were still working when killed: {reached}"
    )


@pytest.fixture(scope="module")
def moments(tmp_path_factory, canvas_config) -> tuple[Path, list[str]]:
    """(folder, command) of an undisturbed run, beside copies of its folder from before each change of a file."""
    place = tmp_path_factory.mktemp("moments")
    (place / "copies").mkdir()
    few = ["train.steps=2", "mask.collect=1", "prepare.steps=1", "train.checkpoint_every=0.001"]
    call = ["unlearn", canvas_config, *RUN, *few, "train.background_save=false"]
    script, run = str(PROJECT / "tests" / "workers" / "snapshots.py"), place / "run"
    ranks = Ranks(1, script, str(place / "copies"), str(run), *call, f"run.folder={run}", output=place / "output.txt")
    assert ranks.wait(120) == [0], (place / "output.txt").read_text()
    return place, call


def files_of(run: Path) -> set[str]:
    """The files of a run folder, except those that say who holds it."""
    return {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()} - {".lock", ".holder"}


def differing(copies: Sequence[Path]) -> list[Path]:
    """Of the copies that differ in temporary files alone, the one with the most of them."""
    chosen: dict[str, Path] = {}
    for copy in copies:
        files = sorted(file for file in copy.rglob("*") if file.is_file())
        lasting = [file for file in files if ".tmp" not in str(file.relative_to(copy))]
        key = str([(str(file.relative_to(copy)), file_sha256(file)) for file in lasting])
        if key not in chosen or len(files) >= len(list(chosen[key].rglob("*"))):
            chosen[key] = copy
    return sorted(chosen.values())


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    "every", [pytest.param(4, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.exhaustive)]
)
def test_a_run_killed_at_any_change_of_a_file_ends_bit_identical_with_the_same_files(moments, tmp_path, every):
    place, call = moments
    expected, files = weights(place / "run"), files_of(place / "run")
    copies = sorted(path for path in (place / "copies").iterdir() if path.is_dir() and path.suffix == "")
    distinct = differing(copies)
    assert len(copies) > 150 and len(distinct) > 70

    def resume(copy: Path) -> None:
        folder = tmp_path / copy.name
        shutil.copytree(copy, folder)
        why = (copy.name, copy.with_suffix(".txt").read_text())
        sculpt(*call, f"run.folder={folder}")
        found = weights(folder)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found), why
        assert files_of(folder) == files and passes(folder) == passes(place / "run"), why
        shutil.rmtree(folder)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(resume, distinct[::every]))


def stopped_in_the_middle(canvas_config: str, folder: Path, output: Path, *more: str, ranks: int = 1) -> list[str]:
    """Stop a run by a signal in its second concept; returns the command that resumes it."""
    call = ["unlearn", canvas_config, *RUN, "train.steps=40", "train.checkpoint_every=0", f"run.folder={folder}", *more]
    started = Ranks(ranks, "-m", "sculpt_dist", *call, output=output)
    wait_for_step(folder, started.pids, 1, 10)
    for pid in started.pids:
        os.kill(pid, signal.SIGTERM)
    assert set(started.wait(120)) == {75}, output.read_text()
    return call


@pytest.mark.two_ranks
@pytest.mark.slow
def test_a_run_resumed_on_other_ranks_and_another_stage_continues_with_the_same_samples(canvas_config, tmp_path):
    # All turnovers come before the stop: after it rounding could decide a near tie, and one such weight affects others.
    early = "mask.until=0.2"
    call = stopped_in_the_middle(canvas_config, tmp_path / "run", tmp_path / "out.txt", early, "engine.stage=2")
    shutil.copytree(tmp_path / "run" / "data", tmp_path / "straight" / "data")
    printed = sculpt(*call[:-1], "engine.stage=3", ranks=2, code=2)
    assert "engine.stage: 2 there, 3 here" in printed and "--override" in printed
    sculpt(*call[:-1], "engine.stage=3", "--override", ranks=2)
    sculpt(*call, f"run.folder={tmp_path / 'straight'}")
    entries = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "straight")
    ]
    assert [(e["concept"], e["step"]) for e in entries[0]] == [(e["concept"], e["step"]) for e in entries[1]]
    worst = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(*entries))
    assert worst < 1e-6, worst
    found, expected = weights(tmp_path / "run"), weights(tmp_path / "straight")
    assert all(torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4) for name in expected)


@pytest.mark.two_ranks
@pytest.mark.slow
def test_a_changed_configuration_is_refused_before_the_model_is_built_unless_overridden(canvas_config, tmp_path):
    call = stopped_in_the_middle(canvas_config, tmp_path / "run", tmp_path / "out.txt")
    printed = sculpt(*call, "train.lr=2e-3", code=2)
    assert "train.lr: 0.001 there, 0.002 here" in printed and "--override" in printed
    swapped = "concepts=[{target: boat, superclass: vehicle},{target: bird, superclass: animal}]"
    printed = sculpt(*call, swapped, "--override", code=2)
    assert "has finished bird, and the configuration begins with boat, bird" in printed
    printed = sculpt(*call, "train.lr=2e-3", "--override")
    assert "continuing with another configuration: train.lr: 0.001 there, 0.002 here" in printed
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rate = {(entry["concept"], entry["step"]): entry.get("lr") for entry in entries}
    assert rate[1, 40] == pytest.approx(2 * rate[0, 40]) and rate[1, 5] == rate[0, 5] > 0  # unchanged before the stop
    assert [(e["concept"], e["step"]) for e in entries] == [(c, s) for c in range(2) for s in range(42)]


@pytest.mark.two_ranks
@pytest.mark.slow
def test_a_changed_mask_restarts_the_concept(canvas_config, tmp_path):
    call = stopped_in_the_middle(canvas_config, tmp_path / "run", tmp_path / "out.txt")
    sculpt(*call, "mask.keep=0.25", "mask.collect=4", "--override")
    assert (
        "restarts this concept, because the mask's settings have changed" in (tmp_path / "run" / "log.txt").read_text()
    )
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = {(entry["concept"], entry["step"]): entry for entry in entries}  # the later of two wins
    assert [lines[1, step]["phase"] for step in range(44)] == ["collect"] * 4 + ["train"] * 40 and (1, 44) not in lines
    assert json.loads((tmp_path / "run" / "costs.json").read_text())["weights"]["open"] == 200_704 // 4
