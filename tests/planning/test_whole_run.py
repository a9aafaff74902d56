"""Where the time of a whole run goes: its counts against those of a real run, and seconds by hand."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from harness import PROJECT, TINIEST, sculpt
from runs import lines, passes
from safetensors import safe_open

from sculpt_dist.config.load import load_config
from sculpt_dist.maths.planning import Buckets, Layout, Rates, Rehearsed
from sculpt_dist.maths.run_times import Sampling, Training, Work, run_seconds
from sculpt_dist.planning.plan import plan_run

CANVAS = PROJECT / "configs" / "canvas" / "dm_cal.yaml"
RATES = Rates(
    flops=100.0,
    bandwidth={"sum": 10.0, "gather": 5.0, "scatter": 5.0},
    latency=0.5,
    sampling=200.0,
    disk=40.0,
    copy=80.0,
    store=0.125,
    start=3.0,
)
WORK = Work(
    concepts=2,
    prompts=4,
    prompt_flops=50.0,
    drawing=Sampling(10, 800.0, 3),
    scoring=(Sampling(6, 400.0, 2, 2), Sampling(6, 400.0, 2, 1)),
    training=(
        Training(1, 100.0, (Rehearsed(0, (), 0, 0, (True,), 0),)),
        Training(5, 300.0, (Rehearsed(0, (), 0, 0, (False, True), 0),)),
    ),
    batch=4,
    accumulate=1,
    files=80,
    every=0.0,
    background=True,
)
BUCKETS = Buckets(reduce=1000, prefetch=10, live=20, whole=True)


def layout(stage: int, elements: int = 16):
    """Of a net of 100 weights in three large tensors, of which one trains."""

    def of(ranks: int) -> Layout:
        shard = elements if stage == 0 else -(-elements // ranks)
        return Layout(100, (elements,), stage, ranks, 4, shard, 100, large=90, large_tensors=3)

    return of


def seconds(ranks: int, stage: int = 0, training_ranks: int | None = None, **changes) -> dict[str, float]:
    work = replace(WORK, **changes)
    return run_seconds(work, layout(stage), BUCKETS, RATES, ranks, training_ranks or ranks)


def test_on_one_rank_the_parts_are_their_work_over_the_rates():
    written = 21 * 16 / 40 + 0.125
    scoring = 3 * 6 * 400 / 200
    assert seconds(1) == {
        "start": 3 + 2 * 80 / 40 + 4 * 50 / 100,
        "drawing": 10 * (800 / 200 + 0.125),
        "training": 2 * (1 * 100 + 5 * 300) * 4 / 100,
        "checkpoints": pytest.approx(2 * (21 * 16 / 80 + max(0, written - 12))),
        "scoring": scoring,
        "export": 2 * 80 / 40,
    }
    assert seconds(1, background=False)["checkpoints"] == pytest.approx(2 * written)
    each = (100 + 5 * 300) * 4 / 100  # seconds of a concept: with a checkpoint every 10 s, six within it
    within = 21 * 16 / 80 + max(0, written - 10)
    assert seconds(1, every=10.0)["checkpoints"] == pytest.approx(2 * (int(each / 10) * within + 21 * 16 / 80))
    assert seconds(1, every=10.0, scoring=())["checkpoints"] == pytest.approx(
        2 * (int(each / 10) * within + 21 * 16 / 80 + written)
    )


def test_ranks_share_batches_and_samples_and_wait_for_each_other():
    one, four = seconds(1), seconds(4)
    assert four["drawing"] == 3 * (800 / 200 + 3 * 0.5 * 2 + 4 * 0.125)  # 10 batches in three rounds
    assert four["scoring"] == 3 * 2 * (400 / 200 + 0.5 * 2)
    assert four["start"] == one["start"]
    assert four["export"] == one["export"] + 2 * 3 / 4 * 64 / 10 + 1 * 0.5 * 2
    sent = 2 * 3 / 4 * 64 / 10 + 3 * 0.5 * 2  # of a step: a sum of 16 gradients; it and 2 small collectives wait
    assert four["training"] == pytest.approx(2 * (1 + 5 * 3 + 6 * sent))


def test_stage_3_gathers_the_net_for_every_forward_of_the_sampler_beyond_what_stays():
    gathered = 3 / 4 * 4 * (90 - 20) / 5 + 3 * 0.5 * 2
    assert seconds(4, 3)["drawing"] == pytest.approx(seconds(4)["drawing"] + 3 * 3 * gathered)
    assert seconds(4, 3)["scoring"] == pytest.approx(seconds(4)["scoring"] + 3 * 2 * 2 * gathered)


def test_more_ranks_than_batches_or_samples_do_not_help():
    many, more = seconds(16, training_ranks=4), seconds(64, training_ranks=4)
    assert many["training"] == more["training"] == seconds(4)["training"]
    assert many["drawing"] < more["drawing"] and many["scoring"] < more["scoring"]  # one round; the waits grow


def test_the_counts_are_those_of_a_real_run(finished_run):
    config = load_config(CANVAS, [*TINIEST, "run.folder=nowhere"])
    run = plan_run(config, 1, 1e12, device="cpu")["run"]
    counts = run["counts"]
    assert counts["drawn_batches"] == len(list((finished_run / "data").rglob("*.tar")))
    assert counts["steps"] == len(lines(finished_run))
    assert counts["scored_stages"] == len(list((finished_run / "evaluation").glob("*/scores.json"))) == 2
    with safe_open(finished_run / "data" / "embeddings.safetensors", "pt") as file:
        assert counts["prompts"] == sum(map(len, json.loads(file.metadata()["prompts"])))
    assert passes(finished_run)["prepare"] == 2 * 2 * config.prepare.samples * config.prepare.steps
    assert "seconds" not in run["table"][0] and run["rates"] is None


def test_a_plan_says_how_many_ranks_each_part_can_use():
    rates = Rates(1e10, {"sum": 1e9, "gather": 1e9, "scatter": 1e9}, 1e-4)
    run = plan_run(load_config(CANVAS, []), 2, 1e12, rates, "cpu")["run"]
    assert [row["ranks"] for row in run["table"]] == [2, 8, 64, 256, 1024]
    assert [row["useful"]["training"] for row in run["table"]] == [2, 6, 12, 12, 12]  # of a batch of 12
    assert [row["useful"]["drawing"] for row in run["table"]] == [2, 8, 24, 24, 24]  # 2 sources x 3 concepts x 4
    assert all(row["total_seconds"] == pytest.approx(sum(row["seconds"].values())) for row in run["table"])
    parts = [row["seconds"] for row in run["table"]]
    assert all(a["scoring"] > b["scoring"] for a, b in itertools.pairwise(parts[:3]))
    shared = plan_run(load_config(CANVAS, ["train.batch=1024"]), 2, 1e12, rates, "cpu")["run"]["table"]
    assert [row["useful"]["training"] for row in shared] == [2, 8, 64, 256, 1024]


def test_the_command_prints_where_the_time_goes(tmp_path):
    rates = tmp_path / "rates.json"
    rates.write_text('{"sampler_flops_per_second": 2e10, "start_seconds": 1.5}\n')
    call = ["plan", str(CANVAS), "--device", "cpu", "--rates", str(rates)]
    printed = sculpt(*call, "--flops", "1e10")
    assert "minutes of each part" in printed and "2e+10 while drawing" in printed and "imports 1.5 s" in printed
    assert "train.batch=12: a rank trains at least one sample, so that at most 12 ranks train" in printed
    found = json.loads(sculpt(*call, "--flops", "1e10", "--json").splitlines()[-1])["run"]
    assert found["rates"]["sampling"] == 2e10 and set(found["table"][0]["seconds"]) == {
        "start",
        "drawing",
        "training",
        "checkpoints",
        "scoring",
        "export",
    }
