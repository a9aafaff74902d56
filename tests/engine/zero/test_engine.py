"""The engine's invariants on the shipped nets, for every kind, stage and precision, on one to eight ranks."""

from __future__ import annotations

import json
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch
from harness import PROJECT, launch
from safetensors.torch import load_file

from sculpt_dist.core.plugins import plugins

ARCHS = plugins("sculpt_dist.backbones")
SETTINGS = [(0, "fp32", 1), (1, "fp32", 1), (2, "fp32", 1), (3, "fp32", 1), (2, "bf16", 1), (3, "bf16", 1)]
SETTINGS += [(stage, "fp32", 2) for stage in range(4)]  # stage, precision, accumulated micro-batches
REFERENCE = (0, "fp32", 1)  # on one rank; the others are compared with it
DEFAULT = [
    ("sd15", (1, "fp32", 1), 2),
    ("sd15", (2, "fp32", 1), 2),
    ("sd15", (3, "fp32", 1), 2),
    ("sd15", (2, "fp32", 2), 2),
    ("sd15", (2, "bf16", 1), 2),
    ("sd15", (3, "bf16", 1), 1),
    ("sdxl", (2, "fp32", 1), 2),
    ("sana", (3, "fp32", 1), 2),
]
SLOW = [  # with those above, every pair of choices; tests/run/test_many_ranks.py has 4 and 8 ranks
    ("sd15", (0, "fp32", 2), 2),
    ("sdxl", (1, "fp32", 2), 1),
    ("sdxl", (3, "bf16", 1), 2),
    ("sana", (1, "fp32", 1), 2),
    ("sana", (2, "bf16", 1), 1),
    ("sana", (3, "fp32", 2), 2),
    ("sd15", (2, "fp32", 2), 3),
]
PLACES = [(arch, cell, ranks) for arch in ARCHS for cell in SETTINGS for ranks in (1, 2, 3, 4)]
PLACES += [("sd15", (2, "fp32", 1), 8), ("sana", (3, "fp32", 1), 8)]


def places(precision: str | None = None) -> list:
    """(kind, cell, ranks): those in DEFAULT run in the default suite, those in SLOW in CI, the others by hand."""
    chosen = [place for place in PLACES if precision in (None, place[1][1])]
    return [pytest.param(*place, marks=_marks(*place), id=str(place)) for place in chosen]


def _marks(arch: str, cell: tuple, ranks: int) -> list:
    place = (arch, cell, ranks)
    return [] if place in DEFAULT else [pytest.mark.slow if place in SLOW else pytest.mark.exhaustive]


def test_every_pair_of_choices_runs_in_ci():
    def pairs(places: list) -> set:
        choices = [
            (("arch", arch), *zip(("stage", "precision", "micro"), cell), ("ranks", ranks))
            for arch, cell, ranks in places
            if ranks <= 2
        ]
        return {pair for choice in choices for pair in combinations(choice, 2)}

    assert pairs(PLACES) == pairs([*DEFAULT, *SLOW, *((arch, REFERENCE, 1) for arch in ARCHS)])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")

    @cache
    def run(arch: str, ranks: int, stage: int, precision: str, accumulate: int):
        out = folder / f"{arch}-{ranks}-{stage}-{precision}-{accumulate}.safetensors"
        moments = "open" if accumulate > 1 else "all"
        options = [arch, str(stage), precision, str(accumulate), moments]
        launch(ranks, str(PROJECT / "tests" / "workers" / "engine_laws.py"), str(out), *options)
        return load_file(out), json.loads(Path(out).with_suffix(".json").read_text())

    return run


def flips(a: dict, b: dict, kind: str) -> float:
    keys = [key for key in a if key.startswith(kind + "|")]
    different = sum(int(((a[key] > 0) != (b[key] > 0)).sum()) for key in keys)
    return different / sum(a[key].numel() for key in keys)


@pytest.mark.two_ranks
@pytest.mark.parametrize(("arch", "cell", "ranks"), places())
def test_the_same_saliency_gives_the_same_mask_everywhere(outcome, arch, cell, ranks):
    reference, _ = outcome(arch, 1, *REFERENCE)
    tensors, _ = outcome(arch, ranks, *cell)
    keys = [key for key in reference if key.startswith(("built", "turned"))]
    assert len(keys) == 4 * len([key for key in reference if key.startswith("flat|")]) > 0
    assert all(torch.equal(reference[key], tensors[key]) for key in keys)


@pytest.mark.two_ranks
def test_the_mask_opens_exactly_its_share(outcome):
    tensors, notes = outcome("sd15", 2, 3, "fp32", 1)
    for key in (key for key in tensors if key.startswith("built matrix")):
        opened, index = tensors[key] > 0, sorted(k for k in tensors if k.startswith("built matrix")).index(key)
        assert int(opened.sum()) == int(0.3 * opened.numel()), (key, index)
    total = torch.cat([tensors[key] for key in tensors if key.startswith("built global")])
    assert int((total > 0).sum()) == int(0.3 * notes["trained"])


@pytest.mark.two_ranks
@pytest.mark.parametrize(("arch", "cell", "ranks"), places("fp32"))
def test_all_stages_and_rank_counts_train_alike_in_fp32(outcome, arch, cell, ranks):
    reference, reference_notes = outcome(arch, 1, *REFERENCE)
    tensors, notes = outcome(arch, ranks, *cell)
    assert notes["losses"] == pytest.approx(reference_notes["losses"], rel=1e-4)
    assert notes["norms"] == pytest.approx(reference_notes["norms"], rel=1e-3)
    assert notes["squared"] == pytest.approx(reference_notes["squared"], rel=1e-6)
    assert flips(reference, tensors, "opened") <= 1e-3
    for key in (key for key in reference if key.startswith("saliency|")):
        torch.testing.assert_close(tensors[key], reference[key], rtol=1e-3, atol=1e-5)
    same = [((reference[k] > 0) == (tensors[k] > 0)) for k in reference if k.startswith("opened|")]
    pairs = [(reference[k], tensors[k]) for k in reference if k.startswith("flat|")]
    for agreed, (a, b) in zip(same, pairs):
        assert float((a - b).abs()[agreed].max()) < 2e-4  # a fifth of one update at lr 1e-3


@pytest.mark.two_ranks
@pytest.mark.parametrize(("arch", "cell", "ranks"), places("bf16"))
def test_bf16_trains_on_stages_2_and_3(outcome, arch, cell, ranks):
    _, reference_notes = outcome(arch, 1, *REFERENCE)
    _, notes = outcome(arch, ranks, *cell)
    assert notes["losses"] == pytest.approx(reference_notes["losses"], rel=0.05)
    assert notes["losses"] != reference_notes["losses"]


@pytest.mark.two_ranks
@pytest.mark.parametrize(("arch", "cell", "ranks"), places())
def test_export_loads_in_plain_diffusers_and_predicts_the_same(outcome, arch, cell, ranks):
    _, notes = outcome(arch, ranks, *cell)
    assert notes["export_difference"] <= (2e-6 if cell[1] == "fp32" else 0.1)


@pytest.mark.two_ranks
def test_selection_communicates_only_counts(outcome):
    _, notes = outcome("sd15", 2, 2, "fp32", 1)
    # The first digit is counted for open and closed weights, the others at both ends.
    counts = 2 * 2048 + 2 * (128 + 128 + 64)
    # One build and one turnover, for 16 matrices in 32 bits and for all of them together in 64 bits.
    digits = 2 * 16 * counts * 4 + 2 * 1 * counts * 8
    ties = 2 * 2 * 2 * 16 * 2 * 8  # twice per scope, at both ends, of 16 matrices on 2 ranks
    gathered_by_this_test = 4 * 4 * notes["trained"]
    payload = notes["mask_bytes"] - gathered_by_this_test
    assert digits + ties <= payload <= digits + ties + 200
