"""Concepts that train together: their samples take turns, each with its own counterpart."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from harness import PROJECT, SMALL, TINY_RUN, sculpt
from runs import lines, start, wait_for_step

from sculpt_dist.config.load import load_config
from sculpt_dist.core.types import TextCond
from sculpt_dist.data.prompts import concept_prompts, taking_turns
from sculpt_dist.data.sources import InTurn, PromptReader
from sculpt_dist.data.streams import ConceptStreams, Layout, micro_batches
from sculpt_dist.run.setup import resolve

TOGETHER = [*SMALL, "train.together=true", "evaluate.enabled=false"]


def test_every_sample_meets_the_counterpart_of_its_own_concept():
    objects = 'prepare.prompts.object=["a {concept}", "one {concept}", "my {concept}"]'
    styles = 'prepare.prompts.style=["a house[ in {concept}]", "a tree[ in {concept}]"]'
    concepts = (
        "concepts=[{target: cat, superclass: animal}, {target: neon, kind: style}, {target: car, superclass: it}]"
    )
    config = load_config(None, [objects, styles, concepts])
    prompts = [concept_prompts(concept, config.prepare) for concept in config.concepts]
    readers = {
        role: [InTurn(PromptReader(getattr(of, role), count, None), i, 3) for i, of in enumerate(prompts)]
        for role, count in (("target", 5), ("superclass", 11))  # such as own images of the targets
    }
    streams = ConceptStreams(readers, Layout(6, 1, 0, 1), 0, 2)
    assert streams.most_samples == 11
    joined = taking_turns(prompts, 11)
    seen: list[tuple[str, ...]] = []

    def embed(texts):
        seen.append(tuple(texts))
        return TextCond(torch.zeros(len(texts), 1, 1))

    pairs = {of.target[i]: of.superclass[i] for of in prompts for i in range(len(of.target))}
    for batch in micro_batches(streams, embed, joined, torch.device("cpu"), 0, 10):
        targets, as_superclass, superclasses, as_target = seen
        assert as_superclass == tuple(pairs[text] for text in targets)
        assert superclasses == tuple(pairs[text] for text in as_target)
        named = [next(i for i, name in enumerate(("cat", "neon", "car")) if name in text) for text in targets]
        assert named == [0, 1, 2] * 2 and batch.target.prompts == targets
        seen.clear()


@pytest.mark.two_ranks
def test_a_run_together_counts_its_steps_resumes_and_is_the_same_on_two_ranks(canvas_config, tmp_path):
    sculpt("unlearn", canvas_config, *TOGETHER, f"run.folder={tmp_path / 'one'}")
    log = lines(tmp_path / "one")
    assert [(line["concept"], line["step"]) for line in log] == [(1, step) for step in range(2 * (2 + 6))]
    assert [line["global_step"] for line in log] == list(range(16)) and {line["target"] for line in log} == {
        "2 concepts"
    }
    sculpt("verify", str(tmp_path / "one"))
    report = json.loads((tmp_path / "one" / "report" / "report.json").read_text())
    assert report["notes"] == [] and [concept["target"] for concept in report["concepts"]] == ["bird", "boat"]

    call = ["unlearn", canvas_config, *TOGETHER, "train.checkpoint_every=0.001", "train.checkpoint_share=1"]
    call += ["engine.stage=3", f"run.folder={tmp_path / 'two'}"]
    process = start(call)
    wait_for_step(tmp_path / "two", process, 1, 5)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert len(lines(tmp_path / "two")) < 16
    sculpt(*call, ranks=2)
    resumes = [line for line in (tmp_path / "two" / "log.txt").read_text().splitlines() if "resumes from" in line]
    assert len(resumes) == 1 and resumes[0].endswith("no concept finished")
    again = lines(tmp_path / "two")
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in log], rel=2e-3)


@pytest.mark.parametrize(
    "method",
    [
        "surgun",
        "concept_ablation",  # without a stream of targets
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("esd", "kscu", "salun", "rgd")),
    ],
)
def test_every_method_takes_several_concepts_at_once(tmp_path, method):
    given = [*TINY_RUN, "train.steps=2", "mask.collect=1", "train.together=true"]
    sculpt("unlearn", str(PROJECT / f"configs/canvas/{method}.yaml"), *given, f"run.folder={tmp_path / 'run'}")
    scores = json.loads((tmp_path / "run/evaluation/after-01/scores.json").read_text())["plain"]
    assert set(scores["targets"]) == {"bird", "boat"} and scores["UA"] is not None
    stages = {path.name for path in (tmp_path / "run/evaluation").iterdir()}
    assert stages == {"before", "after-01"}


def test_steps_count_for_each_concept():
    concepts = "concepts=[{target: cat, superclass: animal}, {target: car, superclass: vehicle}]"
    given = [concepts, "train.steps=100", "mask.collect=0.1", "mask.refresh=20", "mask.keep=0.5"]
    one, both = (resolve(load_config(None, [*given, f"train.together={at_once}"])).plan for at_once in (False, True))
    assert one is not None and both is not None
    assert (one.collect, one.updates, one.refresh) == (10, 100, 20)
    assert (both.collect, both.updates, both.refresh) == (20, 200, 40)
