"""Run by test_full_size.py on 2 ranks: trains two concepts of a net of SDXL's size; prints seconds and memory."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from setups import backbone_of, setup_of

from sculpt_dist.bench.step import RandomReader
from sculpt_dist.config.load import load_config
from sculpt_dist.config.schema import Concept, RunConfig
from sculpt_dist.core.files import derived_seed
from sculpt_dist.core.types import TextCond
from sculpt_dist.data.prompts import concept_prompts
from sculpt_dist.data.streams import ConceptStreams, Layout
from sculpt_dist.engine import zero
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.request import StopRequest
from sculpt_dist.engine.zero import Engine
from sculpt_dist.run import trainer as trainer_module
from sculpt_dist.run.build import build_engine
from sculpt_dist.run.costs import Costs
from sculpt_dist.run.export import export_model
from sculpt_dist.run.trainer import Trainer

SETTINGS = [
    "model.arch=sdxl",
    "model.dtype=bfloat16",
    "engine.stage=3",
    "engine.precision=bf16",
    "engine.moments=open",
    "engine.gathered=1e8",
    "engine.checkpointing=true",
    "mask.keep=0.1",
    "mask.collect=1",
    "mask.refresh=0",
    "train.batch=2",
    "train.steps=2",
    "train.lr=1e-2",
    "train.background_save=false",
    "concepts=[{target: cat, superclass: animal}, {target: dog, superclass: animal}]",
]


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


def check_weights(engine: Engine, stored: dict[str, torch.Tensor]) -> dict[str, int]:
    """How many weights moved and how many are closed. Raises AssertionError where a closed weight moved."""
    moved = kept = 0
    for shard in engine.shards:
        for f in shard.fragments:
            before = stored[f.name].view(-1)[f.start : f.start + f.numel].float()
            same, opened = shard.flat[f.here] == before, shard.opened[f.here] > 0
            assert bool(same[~opened].all()), f"{f.name}: a closed weight moved"
            moved, kept = moved + int((~same).sum()), kept + int((~opened).sum())
    return {"moved": moved, "closed": kept}


def random_streams(config: RunConfig, group: Group) -> ConceptStreams:
    """Streams of random latents 16 x 16."""
    prompts = concept_prompts(config.concepts[0], config.prepare)
    texts = {"target": prompts.target, "superclass": prompts.superclass, "anchor": prompts.superclass}
    readers = {role: [RandomReader(one, (4, 16, 16), (1024, 1024, 0, 0, 1024, 1024))] for role, one in texts.items()}
    return ConceptStreams(readers, Layout(2, group.size, group.rank, 1), 0, 0)


def main(model: Path, out: Path) -> None:
    torch.set_num_threads(1)
    config = load_config(None, [*SETTINGS, f"model.path={model}", f"run.folder={out.parent / 'run'}"])
    folder = Path(config.run.folder)
    folder.mkdir(exist_ok=True)
    group, report = Group(1200), Report()
    backbone, setup = backbone_of(config, group), setup_of(config)
    report.add("before")
    shard = zero.sharded_net

    def reported_shard(*arguments):
        net = shard(*arguments)
        report.add("net")
        return net

    zero.sharded_net = reported_shard
    backbone.embed = conditions
    trainer_module.concept_streams = lambda *_: random_streams(config, group)

    def log(entry: dict) -> None:
        step = f"concept {entry['concept']} step {entry['step']}"
        report.add(step)
        report[step] = {key: entry.get(key) for key in ("loss", "time_shares", "grad_norm", "open", "bytes")}

    def after_a_concept(net: torch.nn.Module, stage: str, concepts: list[Concept]) -> None:
        report.add(f"save {stage}")
        if stage == "after-00":
            report.update(check_weights(trainer.engine, dict(backbone.stored_weights(trained))))
            report.update(trained=trainer.engine.num_trained, open=trainer.engine.mask.num_open())
        report.add(f"check {stage}")

    with StopRequest(group, folder) as stop:
        tracker = SimpleNamespace(start=lambda *_: None, log=log)
        costs = Costs(folder, group, backbone)
        session = SimpleNamespace(
            setup=setup, folder=folder, group=group, backbone=backbone, base="", costs=costs, stop=stop, tracker=tracker
        )
        session.score = after_a_concept
        trainer = Trainer(session)
        trainer.found, trainer.engine = None, build_engine(setup, backbone, group)
        trained = {fragment.name for one in trainer.engine.shards for fragment in one.fragments}
        report.add("engine")
        sent = group.bytes_communicated()
        weights = trainer.unlearn()
    report["sent"] = group.bytes_communicated() - sent
    report.add("end")
    export_model(config.model.dtype, backbone, weights, out, group)
    report.add("export")
    ranks = group.to_all(dict(report))
    if group.is_first:
        print(json.dumps(ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
