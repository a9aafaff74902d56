"""Run by test_full_size.py on 2 ranks: loads, trains and exports a net of SDXL's size; prints seconds and memory."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from setups import backbone_of, method_of, plan_of, setup_of

from sculpt_dist.backbones.parts.trajectory import Trajectory
from sculpt_dist.bench.step import RandomReader
from sculpt_dist.config.load import load_config
from sculpt_dist.config.schema import Concept
from sculpt_dist.core.files import derived_seed
from sculpt_dist.core.types import TextCond
from sculpt_dist.data.prompts import concept_prompts
from sculpt_dist.data.streams import ConceptStreams, Layout
from sculpt_dist.engine import zero
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.request import StopRequest
from sculpt_dist.run.build import build_engine
from sculpt_dist.run.export import export_model
from sculpt_dist.run.training_loop import ConceptRun, LossWindow, run_concept


def memory(kind: str) -> int:
    """Bytes of this process: VmHWM is the peak, RssAnon its own memory without mapped files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind + ":"))
    return int(line.split()[1]) * 1024


class OwnPeak:
    """The largest RssAnon seen, sampled 20 times a second."""

    def __init__(self) -> None:
        import threading

        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, memory("RssAnon"))

    def take(self) -> int:
        peak, self.peak = self.peak, 0
        return peak


class Report(dict):
    """Seconds and peak memory of each part so far."""

    def __init__(self) -> None:
        self.watch, self.began = OwnPeak(), time.monotonic()

    def add(self, part: str) -> None:
        self |= {
            f"{part}_seconds": time.monotonic() - self.began,
            f"{part}_peak": self.watch.take(),
            part: memory("RssAnon"),
        }
        print(
            part, f"{self[f'{part}_seconds']:.0f} s, {self[f'{part}_peak'] / 1e9:.2f} GB", file=sys.stderr, flush=True
        )
        self.began = time.monotonic()


def conditions(prompts: list[str], negative: bool = False) -> TextCond:
    """Random embeddings of SDXL's widths, seeded by the prompt: the tiny text encoders have other widths."""
    rngs = [torch.Generator().manual_seed(derived_seed(prompt)) for prompt in prompts]
    tokens = torch.stack([torch.randn(77, 2048, generator=rng) for rng in rngs])
    pooled = torch.stack([torch.randn(1280, generator=rng) for rng in rngs])
    return TextCond(tokens, pooled=pooled, size_ids=torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * len(prompts)))


def main(model: Path, out: Path) -> None:
    torch.set_num_threads(1)
    overrides = [
        "model.arch=sdxl",
        f"model.path={model}",
        "model.dtype=bfloat16",
        "engine.stage=3",
        "engine.precision=bf16",
        "train.batch=2",
    ]
    overrides += [
        "engine.moments=open",
        "engine.gathered=1e8",
        "engine.checkpointing=true",
        "mask.keep=0.1",
        "mask.collect=1",
        "mask.refresh=0",
        "train.steps=2",
        "train.lr=1e-2",
    ]
    config = load_config(None, overrides)
    group, report = Group(1200), Report()
    method, backbone = method_of(config), backbone_of(config, group)
    report.add("before")
    shard = zero.sharded_net

    def reported_shard(*arguments):
        net = shard(*arguments)
        report.add("net")
        return net

    zero.sharded_net = reported_shard
    engine = build_engine(setup_of(config), backbone, group)
    report.add("engine")
    backbone.embed = conditions
    prompts = concept_prompts(Concept(target="cat", superclass="animal"), config.prepare)
    readers = {
        role: [RandomReader(texts, (4, 16, 16), (1024, 1024, 0, 0, 1024, 1024))]
        for role, texts in (
            ("target", prompts.target),
            ("superclass", prompts.superclass),
            ("anchor", prompts.superclass),
        )
    }
    streams = ConceptStreams(readers, Layout(2, group.size, group.rank, 1), 0, 0)
    engine.begin_concept(0)
    plan = plan_of(config, method)
    run = ConceptRun(
        0,
        "cat",
        method,
        plan,
        streams,
        prompts,
        dict,
        engine.snapshot(),
        None,
        LossWindow(),
        [],
        [Trajectory(backbone)],
    )
    report.add("teacher")

    def log(entry: dict) -> None:
        report.add(f"step {entry['step']}")
        report[f"step {entry['step']}"] = {
            key: entry.get(key) for key in ("loss", "time_shares", "grad_norm", "open", "bytes")
        }

    sent = group.bytes_communicated()
    with StopRequest(group, out.parent) as stop:
        run_concept(run, engine, backbone, config.train, log, lambda: False, lambda: None, stop)
    report |= {"trained": engine.num_trained, "open": engine.mask.num_open(), "sent": group.bytes_communicated() - sent}
    moved = kept = 0
    stored = dict(backbone.stored_weights({f.name for shard in engine.shards for f in shard.fragments}))
    for shard in engine.shards:
        for f in shard.fragments:
            before = stored[f.name].view(-1)[f.start : f.start + f.numel].float()
            same, opened = shard.flat[f.here] == before, shard.opened[f.here] > 0
            assert bool(same[~opened].all()), f"{f.name}: a closed weight moved"
            moved, kept = moved + int((~same).sum()), kept + int((~opened).sum())
    report |= {"moved": moved, "closed": kept}
    report.add("check")
    export_model(config.model.dtype, backbone, engine.full_weights(backbone.in_stored_order(engine.sizes)), out, group)
    report.add("export")
    ranks = group.to_all(dict(report))
    if group.is_first:
        print(json.dumps(ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
