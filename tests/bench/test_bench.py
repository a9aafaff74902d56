"""The benchmarks run and report consistent figures. The published figures are measured by hand (docs/BENCHMARKS.md)."""

from __future__ import annotations

import json

import pytest
from harness import PROJECT, SMALL, launch, sculpt

from sculpt_dist.bench.embed import bench_embed
from sculpt_dist.bench.mask import PRESETS
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.masking import payload_bytes
from sculpt_dist.planning.rates import read_rates


def test_sizes_are_those_of_the_public_models():
    assert {name: (round(sum(sizes) / 1e6, 1), len(sizes)) for name, sizes in PRESETS.items()} == {
        "sd15": (44.0, 64),
        "sdxl": (545.6, 280),
        "sana": (401.4, 80),
    }


def test_a_turnover_matches_published_code_and_takes_little_memory():
    found = json.loads(sculpt("bench", "mask", "--json").splitlines()[-1])
    assert found["masks_equal"] is True and found["weights"] > 40_000_000
    assert (
        found["extra_bytes_per_weight"] <= 1.3
        and found["speedup_vs_per_matrix_topk"] > 1
        and found["masked_step_over_adamw"] > 0
    )


def test_a_global_turnover_matches_a_sort():
    found = json.loads(sculpt("bench", "mask", "--weights", "3000000", "--scope", "global", "--json").splitlines()[-1])
    assert found["masks_equal"] is True and found["speedup_vs_argsort"] > 1


@pytest.mark.two_ranks
def test_on_two_ranks_the_bytes_sent_are_counted():
    found = json.loads(sculpt("bench", "mask", "--weights", "3000000", "--json", ranks=2).splitlines()[-1])
    sums_of_counts = found["matrices"] * (2 * 2048 + 2 * (128 + 128 + 64) * 2) * 4
    assert found["ranks"] == 2 and sums_of_counts / 2 < found["bytes_communicated"] < 2 * sums_of_counts
    assert payload_bytes(found["matrices"], found["matrices"], 2) == found["bytes_communicated"]


def test_an_unknown_preset_is_refused():
    assert "--preset flux" in sculpt("bench", "mask", "--preset", "flux", code=2)


@pytest.mark.two_ranks
def test_collectives_are_timed_by_kind_and_size():
    found = json.loads(
        sculpt("bench", "comm", "--megabytes", "0.1", "--megabytes", "2", "--json", ranks=2).splitlines()[-1]
    )
    rows = found["collectives"]
    assert found["ranks"] == 2 and found["latency_us"] > 0
    assert [(row["collective"], row["megabytes"]) for row in rows] == [
        (kind, size) for size in (0.1, 2.0) for kind in ("sum", "gather", "scatter")
    ]
    for row in rows[-3:]:
        moved = row["megabytes"] / 1e3 * (1.0 if row["collective"] == "sum" else 0.5)
        assert row["gb_per_second"] == found[f"{row['collective']}_gb_per_second"]
        assert abs(row["gb_per_second"] * row["seconds"] / moved - 1) < 1e-3


@pytest.mark.two_ranks
def test_collectives_match_values_by_hand():
    printed = launch(2, str(PROJECT / "tests" / "workers" / "collectives.py"))
    assert printed.count("as by hand") == 2


def test_bench_comm_needs_two_ranks():
    assert "this job has one rank" in sculpt("bench", "comm", code=2)


@pytest.mark.two_ranks
def test_the_loader_is_timed_on_the_shards_of_the_run(tmp_path, canvas_config):
    run = [canvas_config, *SMALL, f"run.folder={tmp_path}"]
    assert "run prepare again" in sculpt("bench", "data", *run, code=2)
    sculpt("prepare", *run)
    found = json.loads(sculpt("bench", "data", *run, "--seconds", "0.1", "--json").splitlines()[-1])
    assert all(
        found[f"{role}_samples_per_second"] > found["samples_per_second"] > 0
        for role in ("target", "superclass", "anchor")
    )
    assert "distractor_samples_per_second" not in found and found["run_seconds_per_step"] is None
    (tmp_path / "metrics.jsonl").write_text(
        '{"phase": "collect", "seconds": 9}\n{"phase": "train", "seconds": 2}\n{"phase": "train", "seconds": 4}\n'
    )
    found = json.loads(
        sculpt("bench", "data", *run, "train.accumulate=2", "--seconds", "0.1", "--json", ranks=2).splitlines()[-1]
    )
    assert (found["micro_batch"], found["run_seconds_per_step"]) == (1, 3.0)
    assert found["loader_over_step"] == found["seconds_per_step"] / 3.0


def test_the_loader_of_a_method_without_samples_is_refused(tmp_path):
    assert "reads no samples" in sculpt(
        "bench", "data", str(PROJECT / "configs" / "canvas" / "esd.yaml"), f"run.folder={tmp_path}", code=2
    )


def test_the_rate_of_drawing_is_one_that_plan_reads(tmp_path):
    few = ["evaluate.objects=[cat]", "evaluate.styles=[neon]", "evaluate.images=2", "evaluate.steps=2"]
    file = tmp_path / "draw.json"
    file.write_text(sculpt("bench", "draw", *few, "--json"))
    found = json.loads(file.read_text().splitlines()[-1])
    rates = read_rates([file], 1e9, None, None)
    per_image = rates.sampling * found["denoiser_seconds_per_image"] / found["steps"]  # operations of a guided pass
    assert rates.flops == 1e9 and 1e7 < per_image < 1e9


def test_prompts_in_batches_take_less_memory_than_all_at_once():
    found = bench_embed("sana", [], 1000, Group())
    assert (found["batches_of"], found["one_batch_of"]) == (16, 1000)
    assert found["memory_ratio"] > 1.5 and found["batches_seconds"] > 0


@pytest.mark.two_ranks
def test_drawing_is_timed_on_two_ranks_of_which_one_has_nothing_of_its_own_to_draw():
    few = ["evaluate.steps=2", "evaluate.images=1", "evaluate.objects=[cat, car]", "evaluate.styles=[neon]"]
    found = json.loads(launch(2, "-m", "sculpt_dist", "bench", "draw", *few, "--json").strip().splitlines()[-1])
    assert (found["ranks"], found["images"], found["steps"]) == (2, 2, 2)
    parts = [
        found[f"{part}_seconds_per_image"] for part in ("denoiser", "sampling", "decoding", "judging", "evaluation")
    ]
    assert all(seconds > 0 for seconds in parts) and found["sampler_flops_per_second"] > 0
