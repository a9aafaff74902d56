"""Scores over seeds and prompts by hand; the cells of a comparison, and a small real comparison."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from harness import PROJECT, python, rank_environment, sculpt

from sculpt_dist.config.experiments import Comparison, Row, Table
from sculpt_dist.config.load import load_config
from sculpt_dist.config.schema import Concept
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.evaluation.requests import EvaluatedWorld
from sculpt_dist.experiments.compare import (
    checked_configs,
    comparison_cells,
    finished,
    finished_report,
    read_comparison,
    read_record,
    run_comparison,
)
from sculpt_dist.experiments.jobs import Job, _guard, run_jobs, share_machine, visible_gpus
from sculpt_dist.experiments.tables import FinishedCell, _relapse, _scores, _ua_by_target, finished_cell, table_lines
from sculpt_dist.maths.accuracy import Answers, Target, per_prompt, score_counts, unlearning_scores
from sculpt_dist.maths.comparison import (
    ROBUST,
    harmonic,
    harmonic_mean,
    percentiles,
    resampled_scores,
    resampling,
    score_means,
    stacked,
)

CAT, DOG, HOUSE = 0, 1, 2
CANVAS = PROJECT / "configs" / "canvas"


def answers(object_seen: list[int], style_seen: list[int] | None = None) -> Answers:
    """Two prompts of a cat, one of a dog and one of a house, two images each, in style 0."""
    asked = np.array([CAT, CAT, CAT, CAT, DOG, DOG, HOUSE, HOUSE])
    styles = np.array(style_seen or [0] * 8)
    return Answers(np.array([7, 7, 3, 3, 1, 1, 2, 2]), asked, np.zeros(8, int), np.array(object_seen), styles)


FIRST = answers([DOG, CAT, DOG, HOUSE, DOG, DOG, HOUSE, CAT])
SECOND = answers([DOG, DOG, DOG, DOG, DOG, CAT, HOUSE, HOUSE], [0, 0, 0, 0, 0, 1, 0, 0])
TARGETS = [Target("object", CAT, (DOG,))]


def counts(*seeds: Answers):
    return stacked([per_prompt(seed, score_counts(seed, TARGETS))[1] for seed in seeds])


def test_a_score_over_seeds_covers_all_their_images():
    means = score_means(counts(FIRST, SECOND))
    assert means["UA"] == 7 / 8 and means["SA"] == 6 / 8 and means["IRA"] == 6 / 8 and means["CRA"] == 7 / 8
    assert means["H"] == pytest.approx(3 / (8 / 7 + 8 / 6 + 8 / 7))


def test_h_covers_the_measured_scores():
    measured = dict(counts(FIRST, SECOND))
    measured["CRA"] = tuple(np.zeros_like(part) for part in measured["CRA"])  # a classifier that knows no styles
    assert (
        score_means(measured)["H"]
        == pytest.approx(2 / (8 / 7 + 8 / 6))
        == harmonic({"UA": 7 / 8, "IRA": 6 / 8, "CRA": None})
    )
    assert harmonic({"CRA": None}) is None and harmonic({"UA": 0, "IRA": 1}) == 0


def test_h4_is_defined_once_and_orders_the_rows_that_were_attacked():
    assert harmonic({"UA": 0.5, "IRA": 1.0, "CRA": 1.0, "1 - ASR": 0.5}, ROBUST) == pytest.approx(4 / (2 + 1 + 1 + 2))
    concepts, world = (
        [Concept(target="cat", superclass="animal")],
        EvaluatedWorld(("cat", "dog", "house"), (), {}),
    )

    def cell(seen: Answers, rates: dict[str, float], guard: dict | None = None) -> FinishedCell:
        attacks = {name: {"post": rate, "counts": "best", "cases": 4} for name, rate in rates.items()}
        result = {
            "answers": {name: None if name == "style_seen" else column.tolist() for name, column in vars(seen).items()},
            "attacks": {"attacks": attacks},
            "weights": {"trained": 10},
            "passes": {"train": 8},
            "cpu_seconds": {"prepare": 0.0, "train": 0.0},
            "peak_memory_bytes": [1],
            "relapse": [],
            "extra": None,
            "guard": guard,
        }
        return FinishedCell(concepts, world, "float32", result)

    comparison = Comparison(against="weak", rows=[Row(name=name, config="") for name in ("weak", "calm", "guarded")])
    finished = {
        "three/sd15/weak/seed-0": cell(SECOND, {"plain": 0.9, "seeds": 0.5, "inversion": 1.0}),
        "three/sd15/calm/seed-0": cell(FIRST, {}),
        "three/sd15/guarded/seed-0": cell(SECOND, {"plain": 0.0, "seeds": 0.0, "inversion": 0.5}, {"bytes": 5_000}),
    }
    table = Table(title="t", sequence="three", backbones=["sd15"], seeds=[0])
    lines = table_lines(comparison, table, "sd15", finished)
    assert [(line.name, line.asr) for line in lines] == [("guarded", 0.25), ("weak", 0.75), ("calm", None)]
    kept = [lines[1].scores[name].mean for name in ("UA", "IRA")]
    assert lines[1].h4 == pytest.approx(3 / (sum(1 / score for score in kept) + 4)) and lines[2].h4 is None
    assert [(line.note, line.stored) for line in lines[:2]] == [("a guard, which can be removed", 0.005), ("", 4e-5)]


def test_counts_per_prompt_add_up_to_the_scores():
    for seed in (FIRST, SECOND):
        means, scores = score_means(counts(seed)), unlearning_scores(seed, TARGETS)
        measured = {name: score for name, score in scores.items() if score is not None}
        assert {name: means[name] for name in scores if name in means} == pytest.approx(measured)


def test_a_round_counts_seeds_and_prompts_as_often_as_they_were_drawn():
    seeds = np.array([[2, 0], [0, 2]])
    prompts = np.array([[0, 0, 4, 0], [0, 0, 1, 3]])  # prompts in the order 1, 2, 3, 7
    found = resampled_scores(counts(FIRST, SECOND), (seeds, prompts))
    # Round 0: prompt 3 of the first seed; round 1: prompts 3 and 7 of the second.
    assert found["UA"].tolist() == [1.0, 1.0]
    assert np.isnan(found["IRA"]).all() and np.isnan(found["H"]).all()  # no prompt without a target was drawn


def test_both_rows_of_a_pair_count_the_same_rounds():
    weights = [resampling(5, 12, 200), resampling(5, 12, 200)]
    assert all((a == b).all() for a, b in zip(*weights))
    assert weights[0][0].sum(1).tolist() == [5] * 200 and weights[0][1].sum(1).tolist() == [12] * 200


def test_harmonic_mean_and_percentiles():
    found = harmonic_mean([np.array([1.0, 0.0, np.nan]), np.array([0.5, 1.0, 1.0]), np.array([0.5, 1.0, 1.0])])
    assert found[0] == pytest.approx(3 / 5) and found[1] == 0.0 and np.isnan(found[2])
    assert percentiles(np.array([np.nan, *np.linspace(0, 1, 101)])) == pytest.approx((0.025, 0.975))
    assert percentiles(np.array([np.nan])) is None


def test_relapse_is_accuracy_at_the_end_minus_accuracy_right_after():
    assert _relapse([[0.1, 1.0, 1.0], [0.2, 0.0, 1.0], [0.4, 0.1, 0.0]]) == pytest.approx(
        ((0.4 - 0.1) + (0.1 - 0.0)) / 2
    )
    assert _relapse([[0.0]]) is None and _relapse([[None, None], [0.4, 0.0]]) is None


COMPARISON = """
folder: {folder}
record: cells.jsonl
against: plain
overrides: ["train.steps=2", "train.batch=2", "mask.collect=1", "mask.refresh=0",
  "prepare.samples=2", "prepare.steps=2", "prepare.batch=2",
  "evaluate.images=1", "evaluate.steps=2", "evaluate.paraphrases=[]", "evaluate.bootstrap=10",
  "evaluate.reference=canvas"]
sequences:
  two: [{{target: cat, superclass: animal}}, {{target: neon, kind: style}}]
rows:
  - {{name: plain, config: {canvas}/dm_cal.yaml}}
  - name: faster
    config: {canvas}/dm_cal.yaml
    overrides: ["train.lr=1e-2"]
    per_backbone: {{sana: ["train.lr=1e-1"]}}
  - {{name: closed, config: {canvas}/uce.yaml, note: at once}}
tables:
  - {{title: All, sequence: two, backbones: [sd15, sana], seeds: [0, 1]}}
  - {{title: Two rows, sequence: two, backbones: [sd15], rows: [plain, faster], seeds: [0, 2]}}
"""


def written(folder: Path, change=lambda text: text) -> Path:
    file = folder / "comparison.yaml"
    file.write_text(change(COMPARISON.format(folder=folder / "runs", canvas=CANVAS)))
    return file


def test_every_combination_is_one_cell(tmp_path):
    file = written(tmp_path)
    cells = list(comparison_cells(read_comparison(file), file, ["train.clip=0.5"]))
    # The second table shares all cells but those of seed 2.
    assert len({cell.key for cell in cells}) == len(cells) == 3 * 2 * 2 + 2
    cell = next(cell for cell in cells if cell.key == "two/sana/faster/seed-1")
    config = checked_configs(cells)[cell.key]
    assert config == load_config(cell.file, cell.overrides)  # the same as from its command line
    assert (config.model.arch, config.train.seed, config.train.lr, config.train.clip) == ("sana", 1, 0.1, 0.5)
    assert [concept.target for concept in config.concepts] == ["cat", "neon"]
    assert config.run.folder.endswith("two/sana/faster/seed-1")
    assert cells[0].key == "two/sd15/plain/seed-0" and finished(cell, config, {}) is None


@pytest.mark.parametrize("file", sorted((PROJECT / "configs" / "compare").glob("*.yaml")), ids=lambda file: file.name)
def test_every_cell_of_a_shipped_comparison_is_valid(file):
    comparison = read_comparison(file)
    cells = list(comparison_cells(comparison, file, []))
    assert len(checked_configs(cells)) == len(cells)
    listed = load_config(PROJECT / "configs" / "gallery" / "tuning.yaml").concepts
    tuning = {"bird", "tree", "boat"} | {concept.target for concept in listed}
    used = {concept.target for concepts in comparison.sequences.values() for concept in concepts}
    seeds = {cell.seed for cell in cells}
    if file.stem.endswith("tuning"):
        assert used <= tuning and min(seeds) >= 100
    else:
        assert not used & tuning and max(seeds) < 100
    trials = [row.name.rpartition("-")[0] for row in comparison.rows]
    assert (
        file.name != "tuning.yaml" or len({trials.count(name) for name in trials}) == 1
    )  # equally many for every method


@pytest.mark.parametrize("name", ["canvas", "gallery", "robustness"])
def test_the_shipped_record_matches_the_present_cells(name):
    file = PROJECT / "configs" / "compare" / f"{name}.yaml"
    comparison = read_comparison(file)
    cells = list(comparison_cells(comparison, file, []))
    configs, record = checked_configs(cells), read_record(file.parent / comparison.record)
    assert record and {cell.key for cell in cells if finished(cell, configs[cell.key], record)} == set(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace("sequence: two", "sequence: six"),
            "sequence 'six' is not defined; choose one of: two",
        ),
        (lambda text: text.replace("rows: [plain, faster]", "rows: [plan]"), "rows 'plan' is not defined"),
        (lambda text: text.replace("against: plain", "against: best"), "against 'best' is not defined"),
        (lambda text: text.replace("name: faster", "name: plain"), "every row a name of its own"),
        (lambda text: text.replace("record:", "recrod:"), "recrod.*Did you mean: 'record'"),
        (lambda text: text.replace('"train.steps=2"', '"train.stepz=2"'), "cell two/sd15/plain/seed-0: .*train.stepz"),
        (
            lambda text: text.replace("dm_cal.yaml\n    ov", "dm_kal.yaml\n    ov"),
            "cell two/sd15/faster/seed-0: .*no such configuration file",
        ),
        (lambda text: text.replace("target: cat", "target: unicorn"), "unicorn"),
        (lambda text: text.replace("mask.collect=1", "mask.collect=0"), "cell two/sd15/plain/seed-0: mask.collect=0"),
        (
            lambda text: text.replace("train.batch=2", 'train.accumulate=2", "train.batch=3'),
            "train.batch=3 is not divisible",
        ),
        (
            lambda text: text.replace("train.lr=1e-2", "evaluate.enabled=false"),
            "cell two/sd15/faster/seed-0: evaluate.enabled=false",
        ),
        (
            lambda text: text.replace("train.lr=1e-2", "evaluate.images=2"),
            "faster/seed-0: .*other images than the row plain",
        ),
    ],
)
def test_an_invalid_comparison_is_refused_before_anything_runs(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        run_comparison(written(tmp_path, change))
    assert not (tmp_path / "runs").exists()


def test_the_report_of_an_unfinished_run_does_not_count(tmp_path):
    (tmp_path / "report").mkdir()
    for content, found in (
        ({"config": "a", "finished": False}, False),
        ({"config": "a", "finished": True}, True),
        ({"config": "b", "finished": True}, False),
    ):
        (tmp_path / "report" / "report.json").write_text(json.dumps(content))
        assert (finished_report(tmp_path, "a") is not None) == found


def test_an_old_setpriv_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "setpriv").write_text("#!/bin/sh\necho \"setpriv: unrecognized option '$1'\" >&2; exit 1\n")
    (tmp_path / "setpriv").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _guard.cache_clear()
    assert _guard() == ()
    monkeypatch.undo()
    _guard.cache_clear()


def test_a_shard_out_of_range_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="shard 4/4"):
        run_comparison(written(tmp_path), shard=(4, 4))
    assert "write i/n" in sculpt("compare", str(written(tmp_path)), "--shard", "a/2", code=2)


def test_jobs_get_gpus_in_turn_and_equal_shares_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3,GPU-5,7")
    gpus = visible_gpus()
    assert gpus == ["2", "3", "GPU-5", "7"]
    alone, pairs = share_machine(3, 1, gpus, None), share_machine(3, 2, gpus, None)
    assert alone.gpus == (("2",), ("3",), ("GPU-5",)) and str(alone) == "with GPU 2 | 3 | GPU-5"
    assert pairs.gpus == (("2", "3"), ("GPU-5", "7"), ("2", "3"))
    assert pairs.environment(1) == {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "GPU-5,7"}
    assert share_machine(2, 1, gpus, 2).gpus == (("2", "3"), ("GPU-5", "7"))
    with pytest.raises(ConfigError, match="--gpus-per-job 5: this machine shows 4 GPUs"):
        share_machine(1, 1, gpus, 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    on_cpu = share_machine(2, 2, visible_gpus(), None)
    assert (
        on_cpu.environment(0) == {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
        and str(on_cpu) == "with 2 threads for each rank"
    )


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path):
    for name in ("../evil", "/evil", "..", " ", "a\\b"):
        with pytest.raises(ConfigError, match="becomes a folder's name"):
            read_comparison(written(tmp_path, lambda text: text.replace("name: plain", f"name: '{name}'")))  # noqa: B023


def test_a_failed_job_reports_its_last_line_and_the_others_run():
    ended: list[str] = []
    jobs = [Job("bad", ("unlearn", "missing.yaml")), Job("good", ("--help",))]
    failed = run_jobs(jobs, 2, 1, lambda job, failure: ended.append(job.label))
    assert sorted(ended) == ["bad", "good"] and list(failed) == ["bad"]
    assert (
        re.fullmatch("ConfigError: missing.yaml: there is no such configuration file", failed["bad"].line)
        and failed["bad"].error == "ConfigError"
    )
    with pytest.raises(ConfigError, match="jobs=0"):
        run_jobs(jobs, 0, 1, lambda job, failure: None)


@pytest.mark.two_ranks
@pytest.mark.slow
def test_a_comparison_runs_in_shards_continues_and_writes_its_tables(tmp_path):
    file = written(
        tmp_path,
        lambda text: (
            text.replace("seeds: [0, 1]", "seeds: [0]").replace("[sd15, sana]", "[sana]").replace("[0, 2]", "[0]")
        ),
    )
    first = sculpt("compare", str(file), "--shard", "0/2", "--jobs", "2")
    assert (
        "[3/3]" in first
        and not (tmp_path / "runs" / "compare.html").exists()
        and not (tmp_path / "cells.jsonl").exists()
    )
    assert "done" not in sculpt("compare", str(file), "--no-run")
    assert [len(block["lines"]) for block in json.loads((tmp_path / "runs" / "compare.json").read_text())] == [2, 1]
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 3
    assert "[2/2]" in sculpt("compare", str(file), "--jobs", "2")
    assert "done" not in sculpt("compare", str(file))  # nothing is left to run
    blocks = json.loads((tmp_path / "runs" / "compare.json").read_text())
    assert [(block["title"], block["backbone"], len(block["lines"])) for block in blocks] == [
        ("All", "sana", 3),
        ("Two rows", "sd15", 2),
    ]
    plain, faster, closed = blocks[0]["lines"]
    assert plain["scores"]["UA"]["difference"] is None and faster["scores"]["UA"]["difference"] is not None
    assert (
        closed["passes"] == 0
        and closed["relapse"] is None
        and plain["passes"] == faster["passes"] > 0
        and plain["fid"] > 0
    )
    assert closed["trained"] * 4 / 1e6 == pytest.approx(closed["stored"])
    scores = json.loads((tmp_path / "runs/two/sana/faster/seed-0/evaluation/after-01/scores.json").read_text())["plain"]
    assert {name: faster["scores"][name]["mean"] for name in ("UA", "IRA", "CRA")} == pytest.approx(
        {name: scores[name] for name in ("UA", "IRA", "CRA")}
    )
    assert faster["targets"] == pytest.approx({name: target["UA"] for name, target in scores["targets"].items()})
    kept = {path.name for path in (tmp_path / "runs").rglob("images/*.png")}
    assert kept and all("--" in name for name in kept), "only the first image of each pair is kept"
    page = (tmp_path / "runs" / "compare.html").read_text()
    assert (
        "closed" in page
        and page.count("data:image/png") >= 5 * 4
        and "| **plain** |" in (tmp_path / "runs" / "compare.md").read_text()
    )
    (tmp_path / "runs").rename(tmp_path / "elsewhere")  # the record is enough for the tables
    sculpt("compare", str(file))
    assert json.loads((tmp_path / "runs" / "compare.json").read_text()) == blocks


@pytest.mark.slow
def test_a_stopped_comparison_saves_its_running_cells(tmp_path):
    file = written(tmp_path, lambda text: text.replace("train.steps=2", "train.steps=400"))
    command = [python(), "-m", "sculpt_dist", "compare", str(file), "--shard", "0/100"]
    process = subprocess.Popen(
        command, env=rank_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = tmp_path / "runs/two/sd15/plain/seed-0/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.is_file() and lines.read_text().count("\n") > 5):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "what was running is saved" in printed
    assert list((lines.parent / "checkpoints").glob("step-*")) and not (lines.parent / "report").exists()


def test_two_rows_are_compared_over_their_common_seeds(tmp_path):
    file = written(tmp_path)
    configs = checked_configs(list(comparison_cells(read_comparison(file), file, [])))
    cells = {seed: configs[f"two/sd15/plain/seed-{seed}"] for seed in (0, 1, 2)}

    def row(right: dict[int, float]):
        def answered(share: float) -> dict:
            seen = [0 if i < share * 100 else 1 for i in range(100)]  # of 100 images of cats in the first style
            return {
                "prompt": list(range(100)),
                "object_asked": [0] * 100,
                "style_asked": [0] * 100,
                "object_seen": seen,
                "style_seen": [0] * 100,
            }

        return {seed: finished_cell(cells[seed], {"answers": answered(1 - share)}) for seed, share in right.items()}

    scores = _scores(row({0: 0.9, 1: 0.8}), row({0: 0.5, 2: 0.1}))
    assert scores["UA"].mean == pytest.approx(0.9 * 0.5 + 0.8 * 0.5, abs=0.01)
    assert scores["UA"].difference == pytest.approx(0.4, abs=0.01)  # of seed 0 alone
    assert scores["UA"].difference_interval[0] > 0 and "IRA" not in scores
    # No image in neon was requested.
    assert _ua_by_target(list(row({0: 0.9, 1: 0.8}).values())) == {"cat": pytest.approx(0.85), "neon": None}
