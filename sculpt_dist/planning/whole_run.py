"""Where the time of a whole run goes on many ranks: its work, counted, and the seconds of every part."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from sculpt_dist.config.checks import is_scored
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.data.images import own_images
from sculpt_dist.evaluation.requests import as_batches
from sculpt_dist.maths.planning import Buckets, Layout, Rates
from sculpt_dist.maths.run_times import SAVED, Sampling, Training, Work, run_seconds
from sculpt_dist.planning.subject import Drawing, Subject
from sculpt_dist.run.prepare import drawn_sources
from sculpt_dist.run.setup import RunSetup

MANY = (8, 64, 256, 1024)


def plan_whole_run(
    setup: RunSetup, subject: Subject, drawing: Drawing, buckets: Buckets, rates: Rates | None, own: int
) -> dict[str, Any]:
    """The work of a run, how many ranks each part can use, and with `rates` its seconds, on `own` and `MANY` ranks.

    The formulas are those of `maths.run_times`. A run refuses ranks among which its global batch does not divide; a
    row's training is then that of the most ranks that it can use, as jobs of their own for `prepare`, `unlearn` and
    `evaluate` would have it.
    """
    work, engine = count_work(setup, subject, drawing), setup.config.engine

    def layout(ranks: int) -> Layout:
        return subject.layout(engine.stage, engine.precision, ranks)

    scored = max((drawn.batches for drawn in work.scoring), default=0)
    rows: list[dict[str, Any]] = []
    for ranks in sorted({own, *MANY}):
        trains = training_ranks(setup, ranks)
        useful = {"drawing": min(ranks, work.drawing.batches), "training": trains}
        row: dict[str, Any] = {"ranks": ranks, "useful": useful | {"scoring": min(ranks, scored)}}
        if rates is not None:
            row["seconds"] = run_seconds(work, layout, buckets, rates, ranks, trains)
            row["total_seconds"] = sum(row["seconds"].values())
        rows.append(row)
    counts = {
        "concepts": work.concepts,
        "prompts": work.prompts,
        "drawn_batches": work.drawing.batches,
        "scored_stages": sum(drawn.times for drawn in work.scoring),
        "scored_batches": sum(drawn.times * drawn.batches for drawn in work.scoring),
        "steps": work.concepts * sum(kind.steps for kind in work.training),
        "samples_per_step": work.batch,
        "checkpoint_bytes": SAVED * sum(subject.trained),
        "model_bytes": work.files,
    }
    return {"counts": counts, "rates": rates and asdict(rates), "table": rows}


def training_ranks(setup: RunSetup, ranks: int) -> int:
    """The most of these ranks among which the global batch divides."""

    def divides(number: int) -> bool:
        try:
            return setup.micro_batch(number) > 0
        except ConfigError:
            return False

    return next(number for number in range(ranks, 0, -1) if divides(number))


def count_work(setup: RunSetup, subject: Subject, drawing: Drawing) -> Work:
    """All that a run does from its start to its end. The user's own images are encoded, which is not counted."""
    config, (_, plan) = setup.config, setup.trained
    prepare, total = config.prepare, len(config.concepts)
    scheduler = subject.backbone.schedule.scheduler
    collecting = (Training(plan.collect, _sample_flops(subject, 0), tuple(subject.steps[0])),) if plan.collect else ()

    def sampling(batches: int, batch: int, steps: int, decoded: bool, times: int = 1) -> Sampling:
        sampler = type(scheduler).from_config(scheduler.config)
        sampler.set_timesteps(steps)
        flops = len(sampler.timesteps) * drawing.forward.flops + decoded * drawing.decoding.flops
        gathering = 0 if config.engine.draw == "whole" else len(sampler.timesteps)
        return Sampling(batches, batch / drawing.batch * flops, gathering, times)

    def scoring(most: int | None, times: int) -> Sampling:
        scored, evaluation = config.evaluate, replace(setup.evaluation, most=most)
        return sampling(len(as_batches(evaluation.requests, scored.batch)), scored.batch, scored.steps, True, times)

    between = sum(is_scored(config.evaluate.at, done, total) for done in range(setup.first_concept + 1, total))
    stages = [scoring(None, 2), scoring(config.evaluate.subset, between)] if config.evaluate.enabled else []
    return Work(
        concepts=len(config.concepts) - setup.first_concept,
        prompts=_num_prompts(setup),
        prompt_flops=subject.prompt_flops(),
        drawing=sampling(_drawn_batches(setup), prepare.batch, prepare.steps, False),
        scoring=tuple(stages),
        training=(*collecting, Training(plan.updates, _sample_flops(subject, -1), tuple(subject.training))),
        batch=config.train.batch,
        accumulate=config.train.accumulate,
        files=subject.encoders + sum(subject.sizes) * getattr(torch, config.model.dtype).itemsize,
        every=config.train.checkpoint_every,
        background=config.train.background_save,
    )


def _sample_flops(subject: Subject, kind: int) -> float:
    """Operations of a sample in the first or the last kind of step."""
    total = sum(group.forward_flops + group.backward_flops for group in subject.steps[kind])
    return total / subject.micro_batch


def _drawn_batches(setup: RunSetup) -> int:
    """Batches in the queue of `prepare`; sources that a method names itself count as one each."""
    prepare, (method, _) = setup.config.prepare, setup.trained
    of_source = -(-prepare.samples // prepare.batch)
    count = 0
    for concept, prompts in zip(setup.concepts, setup.prompts):
        own = {"target": concept.target, "superclass": concept.superclass}
        for source in drawn_sources(method):
            has_texts = source != "keep" or prompts.keep
            count += of_source if has_texts and not own_images(prepare.images, own.get(source))[0] else 0
    return count + -(-len(setup.held) // prepare.batch)


def _num_prompts(setup: RunSetup) -> int:
    """Distinct prompts that `prepare` embeds, and negative prompts."""
    known = {text for concept in setup.prompts for text in (*concept.target, *concept.superclass, *concept.keep)}
    return len(known.union(setup.held)) + len({"", *(concept.negative for concept in setup.prompts)})
