"""A concept costs the same late in a long run as early; `bench concepts` measures it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
from harness import sculpt

from sculpt_dist.bench.concepts import read_usage, synthetic_names, usage_by_tenth
from sculpt_dist.worlds.canvas.world import WORLD

NUM_CONCEPTS = 20
NAMES = WORLD.objects[:9]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A run of 24 concepts, and the figures of its benchmark."""
    folder = tmp_path_factory.mktemp("long") / "run"
    return folder, bench(folder, NUM_CONCEPTS, "track.tensorboard=true")


def bench(folder: Path, num_concepts: int, *overrides: str) -> dict:
    printed = sculpt(
        "bench", "concepts", *overrides, "--concepts", str(num_concepts), "--folder", str(folder), "--json"
    )
    return json.loads(printed.splitlines()[-1])


def growth(lines: list[dict], name: str) -> float:
    """How much more a concept of the last third takes than one of the first, without the very first concepts."""
    taken = [after[name] - line[name] for line, after in pairwise(lines)]
    third = len(taken) // 3
    return median(taken[-third:]) - median(taken[3 : 3 + third])


def test_a_concept_reads_and_writes_no_more_than_those_before_it(long_run):
    lines = read_usage(long_run[0] / "usage.jsonl")
    assert [line["concept"] for line in lines] == list(range(NUM_CONCEPTS))
    assert abs(growth(lines, "reads")) <= 5 and abs(growth(lines, "writes")) <= 5
    assert abs(growth(lines, "bytes_read")) < 5_000 and abs(growth(lines, "bytes_written")) < 5_000
    assert growth(lines, "open_files") <= 0, "at most its own two shards"


def test_scores_and_samples_of_a_stage_read_no_earlier_stage(tmp_path, canvas_config):
    concepts = ",".join(f"{{target: {name}, superclass: {WORLD.superclass_of[name]}}}" for name in NAMES)
    settings = ["prepare.samples=2", "prepare.steps=1", "train.steps=1", "train.batch=2", "mask.collect=1"]
    scored = ["evaluate.images=1", "evaluate.paraphrase_images=0", "evaluate.steps=1", "evaluate.bootstrap=2"]
    tracked = ["track.sinks=[usage]", "track.tensorboard=true", "evaluate.styles=[neon]", f"concepts=[{concepts}]"]
    sculpt("unlearn", canvas_config, *settings, *scored, *tracked, f"run.folder={tmp_path}")
    lines = read_usage(tmp_path / "usage.jsonl")
    assert len(lines) == len(NAMES) and abs(growth(lines, "reads")) <= 5


def test_the_figures_compare_the_first_tenth_with_the_last_and_a_finished_run_is_not_repeated(long_run):
    folder, found = long_run
    assert found["concepts"] == NUM_CONCEPTS and found["report_pages"] == 1
    assert found["last_over_first_seconds"] == found["last_seconds"] / found["first_seconds"]
    assert found["last_open_files"] >= found["first_open_files"] > 3 and found["last_memory_bytes"] > 1e8
    assert found["metrics_bytes"] == (folder / "metrics.jsonl").stat().st_size
    before = (folder / "usage.jsonl").read_bytes()
    again = bench(folder, NUM_CONCEPTS, "track.tensorboard=true")
    assert {name: value for name, value in again.items() if "_bytes" not in name} == {
        name: value for name, value in found.items() if "_bytes" not in name
    }
    assert (folder / "usage.jsonl").read_bytes() == before


def test_what_lies_between_two_sessions_counts_for_no_concept():
    def line(concept: int, session: float, time: float) -> dict:
        return {"concept": concept, "session": session, "time": time, "cpu_seconds": time}

    lines = [line(0, 1.0, 10.0), line(1, 1.0, 12.0), line(2, 9.0, 500.0), line(3, 9.0, 503.0)]
    found = usage_by_tenth(lines, 40)
    assert (found["first_seconds"], found["first_cpu_seconds"]) == (2.5, 2.5) and "last_seconds" not in found


def test_synthetic_names_are_different_and_no_words_of_the_canvas():
    names = synthetic_names(17_000)
    assert len(set(names)) == 17_000 and not {"cat", "car"} & set(names)


def test_a_number_of_concepts_out_of_range_is_refused():
    assert "--concepts 3: must be from 20 to 17,000" in sculpt("bench", "concepts", "--concepts", "3", code=2)


@pytest.mark.exhaustive
def test_over_a_hundred_concepts_memory_reads_and_open_files_stay_flat(tmp_path):
    found = bench(tmp_path / "run", 105)
    opened = {line["open_files"] for line in read_usage(tmp_path / "run" / "usage.jsonl")[40:]}
    assert len(opened) == 1, "of all shards, at most 64 stay open"
    assert found["last_memory_bytes"] < 1.05 * found["first_memory_bytes"]
    assert abs(found["last_reads"] - found["first_reads"]) < 5
    assert found["report_pages"] == 3 and found["largest_page_bytes"] < 500_000
