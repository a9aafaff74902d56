"""Benchmarks run, and compare what they say that they compare; the figures themselves are taken by hand (docs/BENCHMARKS.md)."""

from __future__ import annotations

import json

from conftest import sculpt

from sculpt_dist.bench.mask import PRESETS


def test_sizes_are_those_of_the_public_models():
    assert {name: (round(sum(sizes) / 1e6, 1), len(sizes)) for name, sizes in PRESETS.items()} == {
        "sd15": (44.0, 64),
        "sdxl": (545.6, 280),
        "sana": (401.4, 80),
    }


def test_a_turnover_agrees_with_the_published_way_and_takes_little_memory():
    found = json.loads(sculpt("bench", "mask", "--json").splitlines()[-1])
    assert found["masks_equal"] is True and found["weights"] > 40_000_000
    assert found["extra_bytes_per_weight"] <= 1.3 and found["speedup_vs_per_matrix_topk"] > 1 and found["masked_step_over_adamw"] > 0


def test_a_global_turnover_agrees_with_a_sort():
    found = json.loads(sculpt("bench", "mask", "--weights", "3000000", "--scope", "global", "--json").splitlines()[-1])
    assert found["masks_equal"] is True and found["speedup_vs_argsort"] > 1


def test_on_two_ranks_it_counts_what_is_sent():
    found = json.loads(sculpt("bench", "mask", "--weights", "3000000", "--json", ranks=2).splitlines()[-1])
    sums_of_counts = found["matrices"] * (2 * 2048 + 2 * (128 + 128 + 64) * 2) * 4
    assert found["ranks"] == 2 and sums_of_counts / 2 < found["bytes_communicated"] < 2 * sums_of_counts


def test_an_unknown_preset_is_refused():
    assert "--preset flux" in sculpt("bench", "mask", "--preset", "flux", code=2)
