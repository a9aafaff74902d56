"""The whole run: prepare, then concept after concept with the model before it as the teacher, then export and report."""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sculpt_dist import build
from sculpt_dist.backbones.base import Backbone
from sculpt_dist.config import Concept, RunConfig, check_batch
from sculpt_dist.data.prompts import concept_prompts
from sculpt_dist.data.shards import ShardReader
from sculpt_dist.data.streams import ConceptStreams, Layout
from sculpt_dist.engine import checkpoint
from sculpt_dist.engine.frozen import FrozenWeights
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.zero import Engine
from sculpt_dist.errors import ConfigError
from sculpt_dist.evaluate import check_evaluation, evaluate
from sculpt_dist.export import export, write_card
from sculpt_dist.files import write_atomically
from sculpt_dist.methods.base import Editor, Method, Setup
from sculpt_dist.prepare import data_folder, prepare
from sculpt_dist.track import Tracker
from sculpt_dist.train import ConceptRun, Plan, Recent, make_plan, run_concept


@dataclass
class Costs:
    """What a run has cost this rank so far, over all its sittings."""

    seconds: dict[str, float] = field(default_factory=lambda: {"prepare": 0.0, "train": 0.0, "evaluate": 0.0, "total": 0.0})
    cpu_seconds: dict[str, float] = field(default_factory=lambda: {"prepare": 0.0, "train": 0.0, "evaluate": 0.0})
    bytes_communicated: int = 0
    weights: dict[str, int] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)
    _sent: int = 0

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """Add the wall and CPU time of the block to a part of the costs."""
        wall, cpu = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            self.seconds[part] += time.monotonic() - wall
            self.cpu_seconds[part] += time.process_time() - cpu

    def take(self, group: Group) -> dict[str, Any]:
        """The totals up to now, as a checkpoint keeps them."""
        now, sent = time.monotonic(), group.bytes_communicated()
        self.seconds["total"] += now - self._since
        self.bytes_communicated += sent - self._sent
        self._since, self._sent = now, sent
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "bytes_communicated": self.bytes_communicated}

    def add(self, saved: Mapping[str, Any]) -> None:
        """Count what earlier sittings cost."""
        for part, value in saved["seconds"].items():
            self.seconds[part] += value
        for part, value in saved["cpu_seconds"].items():
            self.cpu_seconds[part] += value
        self.bytes_communicated += saved["bytes_communicated"]

    def write(self, folder: Path, group: Group) -> None:
        """costs.json: CPU seconds summed over ranks, peak resident memory of each rank, bytes of the first one."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        totals = self.take(group)
        ranks = group.to_all((peak, totals["cpu_seconds"]))
        if group.is_first:
            summed = {part: sum(cpu[part] for _, cpu in ranks) for part in self.cpu_seconds}
            about = {"cpu_seconds": summed, "peak_memory_bytes": [peak for peak, _ in ranks], "ranks": group.size, "weights": self.weights}
            write_atomically(folder / "costs.json", json.dumps(totals | about, indent=1).encode())


@dataclass(frozen=True)
class Run:
    """A finished run: where everything is, and what the report says."""

    folder: Path
    report: dict[str, Any]

    @property
    def model(self) -> Path:
        """The unlearned model, a diffusers pipeline folder."""
        return self.folder / "model"


def run_sequence(config: RunConfig) -> Run:
    """Unlearn every concept of the configuration; called again, it goes on where it stopped.

    Every rank enters. Raises SculptError for what the user can mend, StopRequested after a saved stop.
    """
    costs = Costs()
    method = build.build_method(config)
    plan = None if isinstance(method, Editor) else make_plan(config, method)
    if not config.concepts:
        raise ConfigError("concepts is empty: name at least one, for example 'concepts=[{target: cat, superclass: animal}]'")
    if config.evaluate.enabled:
        check_evaluation(config)
    group = Group(config.engine.timeout)
    check_batch(config, group.size)
    folder = build.claim_folder(config, group)
    backbone = build.build_backbone(config, group)
    base = group.from_first(build.base_fingerprint(backbone.folder, backbone.net_name) if group.is_first else "")
    shards: dict[str, str] = {}
    if plan is not None:
        with costs.counting("prepare"):
            shards = prepare(config, backbone, base, folder, group)
    if group.is_first:
        build.write_manifest(folder, config, base, shards)
    if plan is None:
        weights = edit(config, folder, group, backbone, method, costs)
    else:
        engine = build.build_engine(config, method, backbone, group)
        weights = Sitting(config, folder, group, backbone, engine, method, plan, base, costs).unlearn_all()
    export(config, backbone, weights, folder / "model", group)
    costs.write(folder, group)
    if group.is_first:
        from sculpt_dist.report import write_report

        write_report(folder)
        write_card(folder)
    group.close()
    return Run(folder, json.loads((folder / "report" / "report.json").read_text()))


@dataclass
class Sitting:
    """One process's stretch of a run: from the newest checkpoint to the end, or to a stop."""

    config: RunConfig
    folder: Path
    group: Group
    backbone: Backbone
    engine: Engine
    method: Method
    plan: Plan
    base: str  # fingerprint of the base model
    costs: Costs

    def unlearn_all(self) -> Iterator[tuple[str, Tensor | None]]:
        """Concept after concept, with scores before the first and after each; returns the changed weights, whole on rank 0."""
        total = sum(int(getattr(p, "ds_numel", p.numel())) for p in self.backbone.net.parameters())
        keep = self.config.mask.keep if self.plan.masked else 1.0
        self.costs.weights = {"total": total, "trained": self.engine.num_trained, "open": int(keep * self.engine.num_trained)}
        original = self.engine.snapshot() if self.method.needs_original else None
        first, resumed = self._resume()
        if first and resumed is None:
            self._evaluate_after(first - 1)
        elif not first and resumed is None:
            self._evaluate("before", self.config.concepts)
        tracker = Tracker(self.config, self.folder, self.group.is_first)
        with interrupts() as stop_requested:
            for number in range(first, len(self.config.concepts)):
                run = self._concept_run(number, original, resumed)
                resumed = None
                with self.costs.counting("train"):
                    run_concept(run, self.engine, self.backbone, self.config, tracker.log, lambda: self._save(run), stop_requested)
                self._save_end(number)
                self._evaluate_after(number)
        tracker.close()
        return self.engine.full_weights()

    def _concept_run(self, number: int, original: FrozenWeights | None, resumed: dict[str, Any] | None) -> ConceptRun:
        """A concept from its beginning, or from where its checkpoint left it."""
        concept = self.config.concepts[number]
        prompts = concept_prompts(concept, self.config.prepare.prompts)
        start = self.engine.masters()
        run = ConceptRun(
            number=number,
            target=concept.target,
            method=self.method.prepare(Setup(number, self.backbone, self.plan.updates)),
            plan=self.plan,
            streams=self._streams(number),
            as_superclass=dict(zip(prompts.target, prompts.superclass)),
            teacher=self.engine.snapshot(),
            original=original,
            recent=Recent(),
            start=start,
        )
        self.engine.begin_concept()
        if self.plan.masked and not self.plan.collect:  # a random mask needs no gradients
            self.engine.mask.build()
        if resumed is not None:
            self._restore(run, resumed)
        return run

    def _streams(self, number: int) -> ConceptStreams:
        concept = self.config.concepts[number]

        def reader(of: Concept, role: str) -> ShardReader:
            return ShardReader(data_folder(self.folder, of, role))

        anchors = []
        if "targets" in self.method.anchors:
            anchors += [reader(earlier, "target") for earlier in self.config.concepts[:number]]
        if "superclass" in self.method.anchors:
            anchors.append(reader(concept, "superclass"))
        if "keep" in self.method.anchors and concept.keep:
            anchors.append(reader(concept, "keep"))
        layout = Layout(self.config.train.batch, self.group.size, self.group.rank, self.config.train.accumulate)
        readers = {"target": [reader(concept, "target")], "superclass": [reader(concept, "superclass")], "anchor": anchors}
        return ConceptStreams(readers, layout, self.config.train.seed, number)

    def _evaluate(self, stage: str, concepts: Sequence[Concept]) -> None:
        evaluate_stage(self.config, self.folder, self.group, self.backbone, self.engine.net, stage, concepts, self.costs)

    def _evaluate_after(self, number: int) -> None:
        self._evaluate(f"after-{number:02d}", self.config.concepts[: number + 1])

    def _save(self, run: ConceptRun) -> None:
        """A checkpoint within a concept."""
        extra: dict[str, list[Tensor]] = {"teacher": run.start}
        if run.candidate is not None:
            extra["candidate"] = run.candidate
        state = {
            "concept": run.number,
            "step": run.step,
            "updates": self.engine.optimizer.updates,
            "births": self.engine.mask.births,
            "open_count": self.engine.mask.open_count,
            "recent": asdict(run.recent),
            "candidate": run.candidate is not None,
        }
        self._write(run.number * (self.plan.steps + 1) + run.step, extra, state)

    def _save_end(self, number: int) -> None:
        """A checkpoint between two concepts: only the weights matter."""
        state = {"concept": number + 1, "step": 0, "candidate": False}
        self._write((number + 1) * (self.plan.steps + 1), {}, state)

    def _write(self, number: int, extra: dict[str, list[Tensor]], state: dict[str, Any]) -> None:
        about = {"base": self.base, "config": build.config_fingerprint(self.config), "costs": self.costs.take(self.group)}
        checkpoint.save(self.folder / "checkpoints", number, self.engine.shards, extra, state | about, self.group)

    def _resume(self) -> tuple[int, dict[str, Any] | None]:
        """(first concept, its saved state or None): with the engine's weights as they were before that concept."""
        found = checkpoint.newest(self.folder / "checkpoints", self.group)
        if found is None:
            return 0, None
        path, state = found
        build.check_checkpoint(path, state, self.base, self.config)
        self.costs.add(state["costs"])
        within = state["step"] > 0
        filled = checkpoint.load(path, self.engine.shards, ["teacher"] if within else [])
        if within:
            self.engine.set_masters(filled["teacher"])
        else:
            self.engine.publish()
        return state["concept"], state | {"path": str(path)} if within else None

    def _restore(self, run: ConceptRun, state: dict[str, Any]) -> None:
        """Weights, moments, saliency and mask as they were at the saved step; the teacher is made already."""
        filled = checkpoint.load(Path(state["path"]), self.engine.shards, ["candidate"] if state["candidate"] else [])
        self.engine.publish()
        run.step, run.recent = state["step"], Recent(**state["recent"])
        run.candidate = filled.get("candidate")
        self.engine.optimizer.updates = state["updates"]
        self.engine.mask.births, self.engine.mask.open_count = state["births"], state["open_count"]


def edit(
    config: RunConfig, folder: Path, group: Group, backbone: Backbone, editor: Editor, costs: Costs
) -> Iterator[tuple[str, Tensor | None]]:
    """All concepts at once by a closed form, with scores before and after; returns the changed weights."""
    net = backbone.net
    evaluate_stage(config, folder, group, backbone, net, "before", config.concepts, costs)
    with costs.counting("train"), torch.no_grad():
        changed = editor.edit(backbone, [concept_prompts(concept, config.prepare.prompts) for concept in config.concepts])
        for name, tensor in changed.items():
            net.get_parameter(name).copy_(tensor)
    count = sum(tensor.numel() for tensor in changed.values())
    costs.weights = {"total": sum(p.numel() for p in net.parameters()), "trained": count, "open": count}
    evaluate_stage(config, folder, group, backbone, net, f"after-{len(config.concepts) - 1:02d}", config.concepts, costs)
    return iter(changed.items())


def evaluate_stage(
    config: RunConfig, folder: Path, group: Group, backbone: Backbone, net: nn.Module, stage: str, concepts: Sequence[Concept], costs: Costs
) -> None:
    """Scores of the present weights, unless they are on the disk already or not wanted."""
    where = folder / "evaluation" / stage
    done = group.from_first((where / "scores.json").is_file())
    if config.evaluate.enabled and not done:
        with costs.counting("evaluate"):
            evaluate(config, backbone, net, group, where, concepts, stage)


@contextmanager
def interrupts() -> Iterator[Any]:
    """While open, SIGINT, SIGTERM and SIGUSR1 set a flag in place of ending the process; yields the question whether one came."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda caught, frame: came.append(caught)) for number in numbers}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
