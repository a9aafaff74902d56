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
from typing import Any, Iterator, Sequence

import torch
from torch import Tensor

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
from sculpt_dist.methods.base import Method, Setup
from sculpt_dist.prepare import data_folder, prepare
from sculpt_dist.track import Tracker
from sculpt_dist.train import ConceptRun, Plan, Recent, make_plan, run_concept


@dataclass
class Costs:
    """What a run has cost this rank so far, over all its sittings."""

    seconds: dict[str, float] = field(default_factory=lambda: {"prepare": 0.0, "train": 0.0, "evaluate": 0.0, "total": 0.0})
    cpu_seconds: dict[str, float] = field(default_factory=lambda: {"prepare": 0.0, "train": 0.0, "evaluate": 0.0})
    bytes_communicated: int = 0

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """Add the wall and CPU time of the block to a part of this rank's costs."""
        wall, cpu = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            self.seconds[part] += time.monotonic() - wall
            self.cpu_seconds[part] += time.process_time() - cpu


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
    began = time.monotonic()
    method = build.build_method(config)
    plan = make_plan(config, method)
    if not config.concepts:
        raise ConfigError("concepts is empty: name at least one, for example 'concepts=[{target: cat, superclass: animal}]'")
    if config.evaluate.enabled:
        check_evaluation(config)
    group = Group(config.engine.timeout)
    check_batch(config, group.size)
    folder = build.claim_folder(config, group)
    backbone = build.build_backbone(config, group)
    base = group.from_first(build.base_fingerprint(backbone.folder, backbone.net_name) if group.is_first else "")
    costs = Costs()
    with costs.counting("prepare"):
        shards = prepare(config, backbone, base, folder, group)
    if group.is_first:
        build.write_manifest(folder, config, base, shards)
    shapes = {name: parameter.shape for name, parameter in backbone.net.named_parameters()}
    sitting = Sitting(config, folder, group, backbone, build.build_engine(config, method, backbone, group), method, plan, base, costs, began)
    sitting.unlearn_all()
    export(config, backbone, sitting.engine.full_weights(), shapes, folder / "model", group)
    sitting.write_costs()
    if group.is_first:
        from sculpt_dist.report import write_report

        write_report(folder)
        write_card(folder)
    group.barrier()
    return Run(folder, json.loads((folder / "report" / "report.json").read_text()))


class Sitting:
    """One process's stretch of a run: from the newest checkpoint to the end, or to a stop."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        group: Group,
        backbone: Backbone,
        engine: Engine,
        method: Method,
        plan: Plan,
        base: str,
        costs: Costs,
        began: float,
    ) -> None:
        self.config, self.folder, self.group, self.backbone, self.engine = config, folder, group, backbone, engine
        self.method, self.plan, self.base, self.costs, self.began = method, plan, base, costs, began
        self.bytes_before = 0
        self.original = engine.snapshot() if method.needs_original else None

    def unlearn_all(self) -> None:
        """Concept after concept, with scores before the first and after each."""
        first, resumed = self._resume()
        tracker = Tracker(self.config, self.folder, self.group.is_first)
        if self.config.evaluate.enabled:
            self._evaluate("before", self.config.concepts)
        with interrupts() as stop_requested:
            for number in range(first, len(self.config.concepts)):
                run = self._concept_run(number, resumed)
                resumed = None
                with self.costs.counting("train"):
                    run_concept(
                        run, self.engine, self.backbone, self.config, tracker.log, lambda: self._save(run), stop_requested
                    )
                self._save_end(number)
                self._evaluate(f"after-{number:02d}", self.config.concepts[: number + 1])
        self._evaluate(f"after-{len(self.config.concepts) - 1:02d}", self.config.concepts)
        tracker.close()

    def write_costs(self) -> None:
        """costs.json: what the report says of time, memory, weights and communication."""
        self._add_costs()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peaks = self.group.to_all(peak)
        processors = self.group.to_all(self.costs.cpu_seconds)
        if self.group.is_first:
            content = asdict(self.costs) | {
                "cpu_seconds": {part: sum(rank[part] for rank in processors) for part in self.costs.cpu_seconds},  # over ranks
                "peak_memory_bytes": peaks,
                "ranks": self.group.size,
                "weights": {
                    "total": sum(int(getattr(p, "ds_numel", p.numel())) for p in self.backbone.net.parameters()),
                    "trained": self.engine.num_trained,
                    "open": int(self.config.mask.keep * self.engine.num_trained) if self.plan.masked else self.engine.num_trained,
                },
            }
            write_atomically(self.folder / "costs.json", json.dumps(content, indent=1).encode())

    def _concept_run(self, number: int, resumed: dict[str, Any] | None) -> ConceptRun:
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
            original=self.original,
            recent=Recent(),
            start=start,
        )
        self.engine.begin_concept()
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
        """Scores of the present weights, unless they are on the disk already."""
        where = self.folder / "evaluation" / stage
        done = self.group.from_first((where / "scores.json").is_file())
        if not self.config.evaluate.enabled or done:
            return
        with self.costs.counting("evaluate"):
            evaluate(self.config, self.backbone, self.engine.net, self.group, where, concepts, stage)

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
        self._add_costs()
        about = {"base": self.base, "config": build.config_fingerprint(self.config), "costs": asdict(self.costs)}
        checkpoint.save(self.folder / "checkpoints", number, self.engine.shards, extra, state | about, self.group)

    def _resume(self) -> tuple[int, dict[str, Any] | None]:
        """(first concept, its saved state or None): with the engine's weights as they were before that concept."""
        found = checkpoint.newest(self.folder / "checkpoints", self.group)
        if found is None:
            return 0, None
        path, state = found
        build.check_checkpoint(path, state, self.base, self.config)
        self._take_costs(state["costs"])
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

    def _add_costs(self) -> None:
        """Move what has accrued since the last call into the totals."""
        now, sent = time.monotonic(), self.group.bytes_communicated()
        self.costs.seconds["total"] += now - self.began
        self.began = now
        self.costs.bytes_communicated += sent - self.bytes_before
        self.bytes_before = sent

    def _take_costs(self, saved: dict[str, Any]) -> None:
        for kind in ("seconds", "cpu_seconds"):
            for part, value in saved[kind].items():
                getattr(self.costs, kind)[part] += value
        self.costs.bytes_communicated += saved["bytes_communicated"]


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
