"""A process's stretch of a run: from the newest checkpoint through concept after concept, with the model before each as its teacher."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.parts.trajectory import Trajectory
from sculpt_dist.config.schema import Concept, RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import append_line, derived_seed
from sculpt_dist.data.prompts import ConceptPrompts, concept_prompts
from sculpt_dist.data.shards import ShardReader
from sculpt_dist.data.streams import ConceptStreams, Layout, PromptReader, Reader
from sculpt_dist.engine.checkpoints import restore as checkpoint
from sculpt_dist.engine.checkpoints.save import Saver
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.request import LOG_FILE, StopRequest
from sculpt_dist.engine.zero import Engine, FrozenWeights
from sculpt_dist.evaluation.evaluator import evaluate
from sculpt_dist.methods.base import Editor, Method, Setup
from sculpt_dist.run.costs import Costs
from sculpt_dist.run.folder import check_checkpoint, code_versions
from sculpt_dist.run.prepare import data_folder, drawn_prompts
from sculpt_dist.run.train import ConceptRun, LossWindow, Plan, run_concept
from sculpt_dist.track.tracker import Tracker, stage_after


@dataclass
class Session:
    """One process's stretch of a run, and what every kind of method needs of it."""

    config: RunConfig
    folder: Path
    group: Group
    backbone: Backbone
    costs: Costs
    stop: StopRequest
    tracker: Tracker

    def score(self, net: nn.Module, stage: str, concepts: Sequence[Concept]) -> None:
        """Scores of the present weights, unless they are on the disk already or not wanted."""
        where = self.folder / "evaluation" / stage
        done = self.group.from_first((where / "scores.json").is_file())
        if self.config.evaluate.enabled and not done:
            with (
                self.costs.counting("evaluate"),
                torch.compiler.set_stance("force_eager"),
            ):  # other batches: it would compile anew
                evaluate(self.config, self.backbone, net, self.group, where, concepts, stage, self.stop)
            self.costs.write()
        self.tracker.stage(stage)

    def edit(self, editor: Editor, prompts: Sequence[ConceptPrompts]) -> Iterator[tuple[str, Tensor | None]]:
        """All concepts at once by a closed form, with scores before and after; returns the changed weights."""
        net = self.backbone.net
        self.tracker.start()
        self.score(net, "before", self.config.concepts)
        with self.costs.counting("train"), torch.no_grad():
            changed = editor.edit(self.backbone, prompts)
            for name, tensor in changed.items():
                net.get_parameter(name).copy_(tensor)
        count = sum(tensor.numel() for tensor in changed.values())
        self.costs.weights = {"total": sum(p.numel() for p in net.parameters()), "trained": count, "open": count}
        self.score(net, stage_after(len(prompts) - 1), self.config.concepts)
        return iter(changed.items())


@dataclass
class Trainer:
    """A session of a method that trains: from the newest checkpoint to the end, or to a stop."""

    session: Session
    engine: Engine
    method: Method
    plan: Plan
    fingerprints: dict[str, str]  # of what a checkpoint must belong to

    def __post_init__(self) -> None:
        self.config, self.folder, self.group = self.session.config, self.session.folder, self.session.group
        self.backbone, self.costs = self.session.backbone, self.session.costs
        self.saver = Saver(self.folder / "checkpoints", self.group, self.config.train.background_save)

    def unlearn_all(self, found: tuple[Path, dict[str, Any]] | None) -> Iterator[tuple[str, Tensor | None]]:
        """Concept after concept, with scores before the first and after each; returns the changed weights, whole on rank 0.

        `found`: the newest checkpoint and its state, if there is one.
        """
        total = sum(int(getattr(p, "ds_numel", p.numel())) for p in self.engine.net.parameters())
        trained = self.engine.num_trained
        opened = self.engine.mask.planned_open if self.plan.masked else trained
        if not opened:
            raise ConfigError(f"mask.keep={self.config.mask.keep}: opens none of {trained:,} weights; raise it")
        self.costs.weights = {"total": total, "trained": trained, "open": opened}
        original = self.engine.snapshot() if self.method.needs_original else None
        first, resumed = self._resume(found)
        self.session.tracker.start(first, resumed["step"] if resumed else 0, self.plan.steps)
        if first and resumed is None:
            self._score_after(first - 1)
        elif resumed is None:
            self.session.score(self.engine.net, "before", self.config.concepts)
        for number in range(first, len(self.config.concepts)):
            run = self._concept_run(number, original, resumed)
            resumed = None
            self.backbone.release()  # embeddings are known and latents lie in shards: the encoders' memory is the training's
            with self.saver:
                with self.costs.counting("train"):
                    log, save = self.session.tracker.log, lambda: self._save(run)  # noqa: B023 (called within this turn)
                    run_concept(run, self.engine, self.backbone, self.config, log, save, self.session.stop)
                self._save_end(number)
                self._score_after(number)
        return self.engine.full_weights()

    def _concept_run(self, number: int, original: FrozenWeights | None, resumed: dict[str, Any] | None) -> ConceptRun:
        """A concept from its beginning, or from where its checkpoint left it."""
        concept = self.config.concepts[number]
        prompts = concept_prompts(concept, self.config.prepare)
        start = self.engine.masters()
        run = ConceptRun(
            number=number,
            target=concept.target,
            method=self.method.prepare(Setup(number, self.backbone, self.plan.updates, prompts, self.config.concepts)),
            plan=self.plan,
            streams=concept_streams(self.config, self.method, self.backbone, self.group, number),
            prompts=prompts,
            measure=lambda: self._calibrate(number),
            teacher=self.engine.snapshot(),
            original=original,
            recent=LossWindow(),
            start=start,
            trajectories=[Trajectory(self.backbone.schedule) for _ in range(self.config.train.accumulate)],
        )
        self.backbone.embed([""], negative=True)  # what guidance needs, while the encoders are there
        self.engine.begin_concept(number)
        if self.plan.masked and not self.plan.collect:  # a random mask needs no gradients
            self.engine.mask.build()
        if resumed is not None:
            self._restore(run, resumed)
        return run

    def _calibrate(self, number: int) -> dict[str, float]:
        """UA, IRA and CRA of the present weights on few images by seeds of their own, which no reported score uses."""
        wanted = self.config.evaluate
        few = replace(
            wanted,
            images=self.method.calibration_images,
            paraphrase_images=0,
            seed=derived_seed(wanted.seed, "calibrate", number),
            prompts={},  # templates: a list may say the seeds of the images that are reported
            retain_prompts=None,
            bootstrap=1,
            reference=None,
            clip=None,
        )
        where, concepts = self.folder / "evaluation" / "calibrate", self.config.concepts[: number + 1]
        config = replace(self.config, evaluate=few)
        with torch.compiler.set_stance("force_eager"):  # without a stop: that waits for the end of the step
            scores = evaluate(config, self.backbone, self.engine.net, self.group, where, concepts, "calibrate", None)
        return {name: scores["plain"][name] for name in ("UA", "IRA", "CRA") if scores["plain"][name] is not None}

    def _score_after(self, number: int) -> None:
        self.session.score(self.engine.net, stage_after(number), self.config.concepts[: number + 1])

    def _save(self, run: ConceptRun) -> None:
        """A checkpoint within a concept."""
        extra: dict[str, list[Tensor]] = {"teacher": run.start}
        if run.candidate is not None:
            extra["candidate"] = run.candidate
        state = {
            "updates": self.engine.optimizer.updates,
            "mask": self._masking(),
            "births": self.engine.mask.births,
            "selections": self.engine.mask.selections,
            "open_count": self.engine.mask.open_count,
            "recent": asdict(run.recent),
            "candidate": run.candidate is not None,
            "trajectories": [trajectory.index for trajectory in run.trajectories],
        }
        self._write((run.number, run.step), extra, state, self._walked(run))

    def _masking(self) -> dict[str, Any]:
        """What a saved mask and its saliency depend on."""
        mask = self.config.mask
        return {"keep": mask.keep, "scope": mask.scope, "saliency": mask.saliency, "collect": self.plan.collect}

    def _walked(self, run: ConceptRun) -> dict[str, Tensor]:
        """This rank's trajectories, a flat tensor for each position of the global batch."""
        kept = {}
        for micro, trajectory in enumerate(run.trajectories):
            latents = [] if trajectory.latents is None else trajectory.latents
            for position, latent, prompt in zip(run.streams.layout.positions(micro), latents, trajectory.prompts):
                kept[f"trajectory|{position}|0"] = latent.flatten()
                kept[f"trajectory_prompt|{position}|0"] = torch.tensor(list(prompt.encode()), dtype=torch.uint8)
        return kept

    def _save_end(self, number: int) -> None:
        """A checkpoint between two concepts: only the weights matter."""
        self._write((number + 1, 0), {}, {"candidate": False})

    def _write(
        self,
        place: tuple[int, int],
        extra: dict[str, list[Tensor]],
        state: dict[str, Any],
        walked: Mapping[str, Tensor] = {},
    ) -> None:
        concept, step = place
        finished = [done.target for done in self.config.concepts[:concept]]
        about = {"concept": concept, "step": step, "finished": finished, "code": code_versions()}
        held = (
            self.engine.shards if self.group.is_first or not self.engine.replicated else []
        )  # replicas are written once
        self.saver.save(place, held, extra, about | state | self.fingerprints, walked)
        self.costs.write()

    def _resume(self, found: tuple[Path, dict[str, Any]] | None) -> tuple[int, dict[str, Any] | None]:
        """(first concept, its saved state or None): with the engine's weights as they were before that concept."""
        if found is None:
            return 0, None
        path, state = found
        changed = check_checkpoint(path, state, self.fingerprints, self.config)
        self.group.on_first(lambda: self._clear_after(path, state["concept"] if changed else None))
        if self.group.is_first:
            append_line(
                self.folder / LOG_FILE,
                f"goes on from {path.name}, {', '.join(state['finished']) or 'no concept'} finished",
            )
        within = state["step"] > 0
        anew = within and state.get("mask", self._masking()) != self._masking()
        if anew and self.group.is_first:
            append_line(self.folder / LOG_FILE, "begins this concept anew, as the mask is another")
        filled = self.group.together(lambda: checkpoint.load(path, self.engine.shards, ["teacher"] if within else []))
        if within:
            self.engine.set_masters(filled["teacher"])
        else:
            self.engine.publish()
        return state["concept"], state | {"path": str(path)} if within and not anew else None

    def _clear_after(self, path: Path, concept: int | None) -> None:
        """Put aside what is newer than the checkpoint: damaged ones; under a changed configuration (`concept` not None), scores too."""
        checkpoint.set_aside_later(path)
        for scored in (self.folder / "evaluation").glob("after-*") if concept is not None else ():
            if scored.name >= f"after-{concept:02d}":
                shutil.rmtree(scored)

    def _restore(self, run: ConceptRun, state: dict[str, Any]) -> None:
        """Weights, moments, saliency and mask as they were at the saved step; the teacher is made already."""
        filled = checkpoint.load(Path(state["path"]), self.engine.shards, ["candidate"] if state["candidate"] else [])
        self.engine.publish()
        run.step, run.recent = state["step"], LossWindow(**state["recent"])
        run.candidate = filled.get("candidate")
        walked, prompts = (
            checkpoint.load_named(Path(state["path"]), kind) for kind in ("trajectory", "trajectory_prompt")
        )
        for micro, trajectory in enumerate(run.trajectories if prompts else []):
            places = [str(position) for position in run.streams.layout.positions(micro)]
            if micro >= len(state["trajectories"]) or not walked.keys() >= set(places):
                continue  # another batch or accumulation, accepted with run.override: the walk begins anew
            latents = torch.stack([walked[place].view(self.backbone.latent_shape) for place in places])
            trajectory.latents, trajectory.index = latents.to(self.group.device), state["trajectories"][micro]
            trajectory.prompts = tuple(bytes(prompts[place].tolist()).decode() for place in places)
        self.engine.optimizer.updates = state["updates"]
        mask = self.engine.mask
        mask.births, mask.selections, mask.open_count = state["births"], state["selections"], state["open_count"]


def concept_streams(config: RunConfig, method: Method, backbone: Backbone, group: Group, number: int) -> ConceptStreams:
    """The samples of concept `number`, from the run's shards. Raises ShardError where they are missing or damaged."""
    concept, folder = config.concepts[number], Path(config.run.folder)

    def reader(of: Concept, role: str) -> Reader:
        if role in method.samples or role == "keep":
            return ShardReader(data_folder(folder, of, role))
        prompts = concept_prompts(of, config.prepare)
        texts = prompts.target if role == "target" else prompts.superclass
        return PromptReader(texts, config.prepare.samples, backbone.size_ids)

    anchors = []
    if "targets" in method.anchors:
        anchors += [reader(earlier, "target") for earlier in config.concepts[:number]]
    if "superclass" in method.anchors:
        anchors.append(reader(concept, "superclass"))
    if "keep" in method.anchors and concept.keep:
        anchors.append(reader(concept, "keep"))
    layout = Layout(config.train.batch, group.size, group.rank, config.train.accumulate)
    readers = {"target": [reader(concept, "target")], "superclass": [reader(concept, "superclass")], "anchor": anchors}
    if drawn_prompts(folder, concept, "distractor"):
        readers["distractor"] = [ShardReader(data_folder(folder, concept, "distractor"))]
    return ConceptStreams(readers, layout, config.train.seed, number)
