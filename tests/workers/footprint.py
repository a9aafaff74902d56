"""Run by test_plan.py on 1 or 2 ranks: the real training loop for a few steps; prints each rank's peak memory as JSON.

Arguments: KEPT OVERRIDES... The samples are random latents in memory; everything else is as in `unlearn`. KEPT: the C
library keeps freed memory of at most so many bytes at a time for later, which is no need of the run; "usual" leaves it
as it is.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
import threading
import time
from pathlib import Path

import torch
from setups import backbone_of, method_of, plan_of, setup_of

from sculpt_dist.backbones.parts.trajectory import Trajectory
from sculpt_dist.bench.measure import own_memory
from sculpt_dist.bench.step import RandomReader
from sculpt_dist.config.load import load_config
from sculpt_dist.data.prompts import concept_prompts
from sculpt_dist.data.streams import ConceptStreams, Layout
from sculpt_dist.engine.checkpoints.save import Saver
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.request import StopRequest
from sculpt_dist.methods.base import Setup
from sculpt_dist.run.build import build_engine
from sculpt_dist.run.training_loop import ConceptRun, LossWindow, run_concept

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of glibc's mallopt


class Peak:
    """The largest own memory seen, sampled 200 times a second."""

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, own_memory())
            time.sleep(0.005)


def main(kept: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    for threshold in (MMAP_THRESHOLD, TRIM_THRESHOLD) if kept != "usual" else ():
        assert ctypes.CDLL(None).mallopt(threshold, int(kept))
    config = load_config(None, list(overrides))
    group = Group(600)
    # DeepSpeed imports these on first use; their memory should not count.
    for late in ("zero.stage_1_and_2", "zero.stage3", "zero.muon.muon_optimizer"):
        importlib.import_module(f"deepspeed.runtime.{late}")
    method, backbone = method_of(config), backbone_of(config, group)
    plan, concept = plan_of(config, method), config.concepts[0]
    prompts = concept_prompts(concept, config.prepare)
    backbone.embed([*prompts.target, *prompts.superclass])
    backbone.embed([""], negative=True)
    backbone.release()
    before, watch = own_memory(), Peak()
    engine = build_engine(setup_of(config), backbone, group)
    built = watch.peak
    layout = Layout(config.train.batch, group.size, group.rank, config.train.accumulate)
    roles = {
        "target": prompts.target,
        "superclass": prompts.superclass,
        "anchor": prompts.superclass,
        "distractor": prompts.target,
    }
    readers = {role: [RandomReader(texts, backbone.latent_shape, backbone.size_ids)] for role, texts in roles.items()}
    start = engine.masters()
    run = ConceptRun(
        number=0,
        target=concept.target,
        method=method.prepare(Setup(0, backbone, plan.updates, prompts, config.concepts)),
        plan=plan,
        streams=ConceptStreams(readers, layout, 0, 0),
        prompts=prompts,
        measure=dict,
        teacher=engine.snapshot() if method.needs_teacher else None,
        original=engine.snapshot() if method.needs_original else None,
        recent=LossWindow(),
        start=start,
        trajectories=[Trajectory(backbone) for _ in range(config.train.accumulate)],
    )
    engine.begin_concept(0)
    entries = []

    def log(entry) -> None:
        sent = {"bytes": group.bytes_communicated(), "collectives": group.collectives}
        entries.append({"seconds": entry["seconds"], "peak": watch.peak - before} | sent | entry["time_shares"])

    run_folder = Path(config.run.folder)
    run_folder.mkdir(parents=True, exist_ok=True)
    saver = Saver(run_folder / "checkpoints", group, config.train.background_save)

    def save() -> None:
        saver.save((0, run.step), engine.shards, {"teacher": run.start}, {})

    with StopRequest(group, run_folder) as stop, saver:
        run_concept(run, engine, backbone, config.train, log, lambda: config.train.checkpoint_every > 0, save, stop)
    report = {
        "before": before,
        "built": built - before,
        "peak": watch.peak - before,
        "steps": entries,
        "trained": engine.num_trained,
    }
    ranks = group.to_all(report)
    if group.is_first:
        print(json.dumps(ranks))


if __name__ == "__main__":
    main(*sys.argv[1:])
