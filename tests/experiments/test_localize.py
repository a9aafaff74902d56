"""Choosing blocks to train: the runs of the blocks, and a small real localization."""

from __future__ import annotations

import json

import pytest
from harness import PROJECT, sculpt

from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.experiments.localize import block_runs, run_localization

CONFIG = PROJECT / "configs" / "canvas" / "surgun.yaml"
TINY = [
    "concepts=[{target: bird, superclass: animal}]",
    "train.steps=8",
    "train.batch=2",
    "prepare.samples=2",
    "prepare.steps=2",
    "evaluate.steps=2",
]
TINY += ["evaluate.images=1", "evaluate.paraphrase_images=0", "evaluate.bootstrap=10", "model.arch=sana"]


@pytest.mark.parametrize(("arch", "blocks"), [("sd15", [1, 2, 3]), ("sdxl", [1, 2, 3]), ("sana", [0, 1, 2, 3])])
def test_every_block_with_attention_has_a_run(arch, blocks):
    runs = block_runs(CONFIG, [f"model.arch={arch}", "run.folder=runs/x"])
    assert [run.block for run in runs] == blocks
    first = runs[0].config
    assert (
        first.method["blocks"] == [blocks[0]]
        and first.train.steps == load_config(CONFIG).train.steps // 4
        and first.evaluate.images == 1
    )
    assert str(runs[0].folder) == f"runs/x-localize/block-{blocks[0]:02d}" and runs[0].scores is None
    assert first.evaluate.seed != 20000  # not the images of the reported evaluation


def test_block_runs_evaluate_template_prompts_only_and_at_least_one_block_is_chosen(tmp_path):
    with pytest.raises(ConfigError, match="--best 0"):
        run_localization(CONFIG, [], best=0)
    file = tmp_path / "listed.yaml"
    file.write_text(
        f"include: {CONFIG}\nevaluate: "
        "{prompts: {cat: cats.csv}, retain_prompts: coco.csv, reference: canvas, clip: some-folder}\n"
    )
    found = [run.config.evaluate for run in block_runs(file, [])]
    assert found and all((e.prompts, e.retain_prompts, e.reference, e.clip) == (None,) * 4 for e in found)


def test_overrides_apply_to_the_short_runs():
    assert {run.config.train.steps for run in block_runs(CONFIG, ["train.steps=7"])} == {7}
    assert {run.config.evaluate.images for run in block_runs(CONFIG, ["evaluate.images=3"])} == {3}


@pytest.mark.parametrize(
    ("file", "overrides", "index", "message"),
    [
        ("esd.yaml", [], None, "Key 'blocks' not in"),
        ("surgun.yaml", ["evaluate.enabled=false"], None, "judged by the images"),
        ("surgun.yaml", [], 9, "index=9: no such block; there are: 1, 2, 3"),
    ],
)
def test_an_invalid_localization_is_refused(file, overrides, index, message):
    with pytest.raises(ConfigError, match=message):
        run_localization(PROJECT / "configs" / "canvas" / file, overrides, index=index)


@pytest.mark.two_ranks
@pytest.mark.slow
def test_blocks_run_one_by_one_or_together_and_are_ranked_by_their_images(tmp_path):
    arguments = [str(CONFIG), *TINY, f"run.folder={tmp_path / 'run'}"]
    printed = sculpt("localize", *arguments, "--index", "2")
    assert "block 2: done" in printed and "best" not in printed
    printed = sculpt("localize", *arguments, "--best", "1", "--jobs", "2")
    assert "block 2: done" not in printed and printed.count(": done") == 3
    found = json.loads((tmp_path / "run-localize" / "localize.json").read_text())
    scores = [entry["score"] for entry in found["blocks"]]
    assert (
        scores == sorted(scores, reverse=True) and len(scores) == 4 and found["best"] == [found["blocks"][0]["block"]]
    )
    assert f"best: method.blocks={found['best']}" in printed
    for entry in found["blocks"]:
        report = json.loads((tmp_path / f"run-localize/block-{entry['block']:02d}/report/report.json").read_text())[
            "after"
        ]
        assert entry["score"] == pytest.approx(report["UA"] + (report["IRA"] + report["CRA"]) / 2)
    assert ": done" not in sculpt("localize", *arguments)
