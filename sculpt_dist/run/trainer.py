"""A run of a method that trains: concept after concept, each with the model before it as its teacher."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.parts.trajectory import Trajectory
from sculpt_dist.config.checks import is_scored
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import append_line, derived_seed, text_sha256
from sculpt_dist.data.prompts import taking_turns
from sculpt_dist.data.shards import ShardReader
from sculpt_dist.data.sources import InTurn, LateSources, PromptReader, Reader
from sculpt_dist.data.streams import EARLIER_TARGETS, HOLD, ConceptStreams, Layout, StreamSpec
from sculpt_dist.engine.checkpoints.save import Saver
from sculpt_dist.engine.checkpoints.timer import CheckpointTimer
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.request import LOG_FILE
from sculpt_dist.engine.zero import Engine, FrozenWeights
from sculpt_dist.evaluation.evaluator import evaluate
from sculpt_dist.evaluation.requests import resolve_evaluation
from sculpt_dist.methods.base import Setup
from sculpt_dist.run.build import build_engine, open_own_ranks, refine
from sculpt_dist.run.prepare import FIRST, data_folder, drawn_prompts, drawn_sources, hold_folder, prepare_samples
from sculpt_dist.run.session import Session
from sculpt_dist.run.setup import RunSetup
from sculpt_dist.run.state import TrainingState, find_checkpoint
from sculpt_dist.run.training_loop import ConceptRun, LossWindow, run_concept
from sculpt_dist.track.tracker import stage_after


class Trainer:
    """Trains from the newest checkpoint to the end, or to a stop."""

    def __init__(self, session: Session) -> None:
        self.session, self.setup = session, session.setup
        self.group, self.backbone = session.group, session.backbone
        self.method, self.plan = self.setup.trained
        self.engine: Engine | None = None
        self.shards: dict[str, str] = {}

    def prepare(self) -> dict[str, str]:
        """Draw the samples that are missing. On stage 3 the engine's net draws; see `engine.draw`."""
        self.found = find_checkpoint(self.session)  # reject a mismatch before drawing or building anything
        with self.session.costs.counting("prepare"):
            if self.setup.config.engine.stage == 3:
                self.engine = build_engine(self.setup, self.backbone, self.group)
            base, store = self.session.base, self.session.store
            self.shards, passes = prepare_samples(self.setup, self.backbone, self.engine, base, store)
        self.session.costs.set_passes("prepare", passes)
        return self.shards

    def unlearn(self) -> Iterator[tuple[str, Tensor | None]]:
        """Concept after concept, with scores before the first and after each; returns the changed weights."""
        session, concepts = self.session, self.setup.concepts
        engine = self.engine = self.engine or build_engine(self.setup, self.backbone, self.group)
        train = self.setup.config.train
        saver = Saver(session.folder / "checkpoints", self.group, train.background_save)
        tell = partial(append_line, session.folder / LOG_FILE)
        timer = CheckpointTimer(saver, train.checkpoint_every, train.checkpoint_share, tell)
        data = text_sha256(json.dumps(self.shards))
        fingerprints = {"base": session.base, "config": self.setup.fingerprint, "data": data}
        state = TrainingState(session, engine, saver, fingerprints)
        session.costs.weights = self._count_weights(engine)
        original = engine.snapshot() if self.method.needs_original else None
        if train.l1sp or train.l2sp:
            engine.pull_to_present(train.l1sp, train.l2sp)
        first, resumed = state.resume(self.found)
        first = max(first, self.setup.first_concept)
        done = len(concepts) if first == len(concepts) else self.setup.trained_with(first).start
        step = resumed["step"] if resumed else 0
        session.tracker.start(first, step, self._steps_before(first) + step)
        if done:
            self._refine(engine)
        if resumed is None and is_scored(self.setup.config.evaluate.at, done, len(concepts)):
            session.score(engine.drawing, stage_after(done - 1), concepts[:done] if done else concepts)
        if not done:
            self._refine(engine)
        for number in range(first, len(concepts)):
            run = self._concept_run(engine, number, original)
            if resumed is not None:
                state.restore(run, resumed)
            resumed = None
            self._unlearn_concept(engine, run, state, timer)
            del run  # with its teacher and its start, before those of the next concept are made
        return engine.full_weights(self.backbone.in_stored_order(engine.sizes))

    def _refine(self, engine: Engine) -> None:
        with self.session.costs.counting("train"):
            refine(self.setup, self.backbone, engine)

    def _unlearn_concept(self, engine: Engine, run: ConceptRun, state: TrainingState, timer: CheckpointTimer) -> None:
        """Train one concept, with checkpoints within it and after it, and score the result."""
        session = self.session
        self.backbone.release()  # prompts are embedded and latents stored, so free the encoders' memory
        with state.saver:
            with session.costs.counting("train"):
                save, train, log = (lambda: state.save(run)), self.setup.config.train, session.tracker.log
                timer.restart()
                run_concept(run, engine, self.backbone, train, log, timer.due, save, session.stop)
                if (fusion := run.method.fusion()) is not None:
                    engine.transform(fusion)
            state.save_between(run.number + 1)
            done, concepts = run.number + 1, self.setup.concepts
            if is_scored(self.setup.config.evaluate.at, done, len(concepts)):
                session.score(engine.drawing, stage_after(run.number), concepts[:done])

    def _count_weights(self, engine: Engine) -> dict[str, int]:
        """Counts of all weights, trained weights and open weights. Raises ConfigError if none would be open."""
        total = sum(int(getattr(p, "ds_numel", p.numel())) for p in engine.net.parameters())
        trained = engine.num_trained
        opened = engine.mask.planned_open if self.plan.masked else trained
        if self.method.rank_per_concept:
            opened = trained * len(self.setup.trained_with(0)) // len(self.setup.concepts)
        if not opened:
            keep = self.setup.config.mask.keep
            raise ConfigError(f"mask.keep={keep}: opens none of {trained:,} weights; raise it")
        return {"total": total, "trained": trained, "open": opened}

    def _steps_before(self, number: int) -> int:
        return (number - self.setup.first_concept) * self.plan.steps

    def _concept_run(self, engine: Engine, number: int, original: FrozenWeights | None) -> ConceptRun:
        """The state of a concept before its first step."""
        setup, own, train = self.setup, self.setup.trained_with(number), self.setup.config.train
        streams = concept_streams(setup, self.backbone, self.group, number)
        prompts = setup.prompts[number]
        if len(own) > 1:
            prompts = taking_turns([setup.prompts[concept] for concept in own], streams.most_samples)
        start = engine.masters()
        run = ConceptRun(
            number=number,
            target=setup.concepts[number].target if len(own) == 1 else f"{len(own)} concepts",
            method=self.method.prepare(
                Setup(
                    number,
                    self.backbone,
                    self.plan.updates,
                    prompts,
                    setup.concepts,
                    setup.prompts,
                    train.seed,
                    self.group,
                )
            ),
            plan=self.plan,
            streams=streams,
            prompts=prompts,
            measure=lambda: self._calibrate(engine, number),
            teacher=engine.snapshot() if self.method.needs_teacher else None,
            original=original,
            recent=LossWindow(),
            start=start,
            trajectories=[Trajectory(self.backbone) for _ in range(train.accumulate)],
            steps_before=self._steps_before(number),
        )
        self.backbone.embed([""], negative=True)  # guidance needs it, and the encoders are still loaded
        engine.begin_concept(number)
        if self.method.rank_per_concept:
            open_own_ranks(setup, engine, number)
        if self.plan.masked and not self.plan.collect:  # a random mask needs no gradients
            engine.mask.build()
        return run

    def _calibrate(self, engine: Engine, number: int) -> dict[str, float]:
        """UA, IRA and CRA of the present weights on a few images, whose seeds no reported score uses."""
        settings, concepts = self.setup.config.evaluate, self.setup.concepts
        few = replace(
            settings,
            images=self.method.calibration_images,
            paraphrase_images=0,
            witness=None,
            seed=derived_seed(settings.seed, "calibrate", number),
            prompts={},  # templates only: a file may give the seeds of the images that are reported
            retain_prompts=None,
            bootstrap=1,
            reference=None,
            clip=None,
            metrics={},
            keep_images="none",
        )
        evaluation, where = resolve_evaluation(few, concepts), self.session.folder / "evaluation" / "calibrate"
        forgotten = concepts[: number + 1]
        with torch.compiler.set_stance("force_eager"):  # no stop: a request waits for the end of the step
            scores = evaluate(evaluation, self.backbone, engine.net, self.group, where, forgotten, "calibrate", None)
        return {name: scores["plain"][name] for name in ("UA", "IRA", "CRA") if scores["plain"][name] is not None}


def concept_streams(setup: RunSetup, backbone: Backbone, group: Group, number: int) -> ConceptStreams:
    """The streams of concept `number`, from the run's shards, those of earlier targets opened when they are due.

    Raises ShardError where its own are missing or damaged.
    """
    (method, _), config, own = setup.trained, setup.config, setup.trained_with(number)
    drawn, specs = drawn_sources(method), method.streams()
    sources: dict[str, LateSources] = {}
    fixed: dict[str, tuple[int, float]] = {}
    for spec in specs:
        places = _places(spec, setup, number)
        opener = partial(_open_source, setup, drawn, backbone.size_ids, own, places)
        sources[spec.role] = LateSources(len(places), opener)
        for place, (_, concept) in enumerate(places):
            if concept in own:
                _ = sources[spec.role][place]  # opens it
        if spec.fixed is not None and len(own) == 1 and (spec.fixed[0], number) in places:
            fixed[spec.role] = (places.index((spec.fixed[0], number)), spec.fixed[1])
    layout = Layout(config.train.batch, group.size, group.rank, config.train.accumulate)
    layouts = {spec.role: layout.shared(spec) for spec in specs}
    return ConceptStreams(sources, layout, config.train.seed, number, layouts, fixed)


def _places(spec: StreamSpec, setup: RunSetup, number: int) -> list[tuple[str, int]]:
    """The sources of a stream of concept `number`, each by name and concept."""
    own = setup.trained_with(number)

    def has(source: str, concept: int) -> bool:
        if source == "keep":
            return bool(setup.concepts[concept].keep)
        return source in FIRST or bool(drawn_prompts(setup.folder, setup.concepts[concept], source))

    found: list[tuple[str, int]] = []
    for source in spec.source_names:
        if source == HOLD:
            found += [(HOLD, number)] if setup.held else []
        elif source == EARLIER_TARGETS:
            found += [("target", concept) for concept in range(own.start)]
        else:
            found += [(source, concept) for concept in own if has(source, concept)]
    return found


def _open_source(
    setup: RunSetup,
    drawn: Container[str],
    size_ids: tuple[int, ...] | None,
    own: range,
    places: Sequence[tuple[str, int]],
    place: int,
) -> Reader:
    """The source at a place of a stream."""
    source, concept = places[place]
    if source == HOLD:
        return ShardReader(hold_folder(setup.folder))
    if source in drawn:
        reader: Reader = ShardReader(data_folder(setup.folder, setup.concepts[concept], source))
    else:
        prompts = setup.prompts[concept]
        texts = {"target": prompts.target, "superclass": prompts.superclass, "keep": prompts.keep}[source]
        reader = PromptReader(texts, setup.config.prepare.samples, size_ids)
    return InTurn(reader, concept, len(own)) if len(own) > 1 else reader
