"""The numbers in the tables of a comparison. Every interval covers prompts and seeds jointly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sculpt_dist.attacks.base import PLAIN
from sculpt_dist.config.checks import normal
from sculpt_dist.config.experiments import Comparison, Table
from sculpt_dist.config.schema import Concept, RunConfig
from sculpt_dist.evaluation.requests import EvaluatedWorld, image_name, resolve_evaluation
from sculpt_dist.evaluation.scoring import held_objects, score_targets
from sculpt_dist.maths.accuracy import Answers, Counts, per_prompt, score_counts, unlearning_scores
from sculpt_dist.maths.attack_rates import pooled_rate
from sculpt_dist.maths.comparison import (
    HARMONIC,
    ROBUST,
    harmonic,
    percentiles,
    resampled_scores,
    resampling,
    score_means,
    stacked,
)
from sculpt_dist.run.holding import hold_prompts

SCORES = ("UA", "IRA", "CRA", "SA", "H")
TABLE_SCORES = ("UA", "IRA", "IRA_near", "IRA_far", "IRA_held", "CRA", "SA", "H")
ROUNDS = 4000  # of the bootstrap
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MEGA = 1e6


@dataclass(frozen=True)
class FinishedCell:
    """The result of a finished cell, with the parts of its configuration that the tables need."""

    concepts: Sequence[Concept]
    world: EvaluatedWorld
    dtype: str  # of the exported weights
    result: Mapping[str, Any]  # see compare.finished


@dataclass(frozen=True)
class Score:
    mean: float
    interval: tuple[float, float] | None  # 95 %
    difference: float | None  # to the row that is compared against, paired by seed and prompt
    difference_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Line:
    """One row of a table on one backbone. Costs are per run, averaged over seeds."""

    name: str
    note: str
    seeds: tuple[int, ...]
    scores: Mapping[str, Score]
    targets: Mapping[str, float | None]  # UA of each target alone
    relapse: float | None  # accuracy of earlier targets after the last concept, minus that right after each
    fid: float | None
    kid: float | None
    extra: Mapping[str, float | None]  # results of all other metrics
    passes: float  # per concept, for sampling and training
    cpu_seconds: float  # per concept, for sampling and training
    peak_memory: float  # MB of one rank
    trained: int  # number of weights
    stored: float  # MB to ship: the changed weights in the dtype of the export, or the guard
    images: tuple[Path, ...]  # of the first seed, if its run folder exists
    attacks: Mapping[str, tuple[float, list[float] | None]] = field(default_factory=dict)  # rate, 95 % interval
    asr: float | None = None  # the mean rate of these, without the plain prompt's
    h4: float | None = None  # the harmonic mean of UA, IRA, CRA and 1 - ASR


def finished_cell(config: RunConfig, result: Mapping[str, Any]) -> FinishedCell:
    held = hold_prompts(config.hold, config.concepts)
    world = resolve_evaluation(config.evaluate, config.concepts, held).world
    return FinishedCell(config.concepts, world, config.model.dtype, result)


def by_witness(cell: FinishedCell) -> FinishedCell | None:
    """The cell with the answers of `evaluate.witness`; None where it had none."""
    answers = cell.result["answers"].get("witness")
    return (
        None
        if answers is None
        else replace(cell, result={**cell.result, "answers": answers, "relapse": [], "attacks": {}})
    )


def table_lines(
    comparison: Comparison, table: Table, backbone: str, finished: Mapping[str, FinishedCell]
) -> list[Line]:
    """The rows of one table on one backbone, over the finished seeds. A row with no finished seed is left out.

    Rows that were attacked come first, by H4; the others keep their order. `finished`: cells by their key.
    """

    def cells_of(row: str) -> dict[int, FinishedCell]:
        keys = {seed: f"{table.sequence}/{backbone}/{row}/seed-{seed}" for seed in table.seeds}
        found = {seed: finished[key] for seed, key in keys.items() if key in finished}
        if not table.witness:
            return found
        return {seed: judged for seed, cell in found.items() if (judged := by_witness(cell)) is not None}

    rows = {row.name: cells_of(row.name) for row in comparison.rows}
    held = dict.fromkeys(name for cells in rows.values() for cell in cells.values() for name in cell.world.held)
    for cells in rows.values():  # what any row holds is scored apart in all of them
        cells.update({seed: replace(cell, world=replace(cell.world, held=tuple(held))) for seed, cell in cells.items()})
    lines = []
    for row in comparison.rows:
        if rows[row.name] and (not table.rows or row.name in table.rows):
            base = rows[comparison.against] if row.name != comparison.against else {}
            folder = Path(comparison.folder) / table.sequence / backbone / row.name
            lines.append(_line(row.name, row.note, rows[row.name], base, folder))
    return sorted(lines, key=lambda line: -1.0 if line.h4 is None else line.h4, reverse=True)


def score_names(lines: Sequence[Line]) -> list[str]:
    """Names of the scores that any of these lines has."""
    return [name for name in TABLE_SCORES if any(name in line.scores for line in lines)]


def trade_off(lines: Sequence[Line]) -> dict[str, tuple[float, float]]:
    """(UA, the harmonic mean of IRA and CRA) of each line that has them, by its name."""
    means = {line.name: {name: score.mean for name, score in line.scores.items()} for line in lines}
    pairs = {name: (scores.get("UA"), harmonic(scores, ("IRA", "CRA"))) for name, scores in means.items()}
    return {name: (ua, kept) for name, (ua, kept) in pairs.items() if ua is not None and kept is not None}


def attack_columns(lines: Sequence[Line]) -> list[str]:
    """Names of the attacks in any of these lines, the plain prompt first."""
    names = dict.fromkeys(name for line in lines for name in line.attacks)
    return sorted(names, key=lambda name: name != PLAIN)


def extra_names(lines: Sequence[Line]) -> list[str]:
    """Names of the results, in any of these lines, that have no column of their own."""
    return sorted({name for line in lines for name in line.extra})


def _line(
    name: str, note: str, cells: Mapping[int, FinishedCell], base: Mapping[int, FinishedCell], folder: Path
) -> Line:
    seeds = tuple(sorted(cells))
    first = cells[seeds[0]]
    results = [cells[seed].result for seed in seeds]
    num_concepts = len(first.concepts)
    num_trained, guard = first.result["weights"]["trained"], first.result.get("guard")
    images = folder / f"seed-{seeds[0]}" / "evaluation" / f"after-{num_concepts - 1:02d}" / "images"
    passes = [sum(result["passes"].values()) / num_concepts for result in results]
    cpu_seconds = [result["cpu_seconds"] for result in results]
    scores, attacks = _scores(cells, base), _attacks(results)
    asr = _mean([rate for attack, (rate, _) in attacks.items() if attack != PLAIN])
    means = {score: value.mean for score, value in scores.items()}
    return Line(
        name=name,
        note=", ".join(part for part in (note, "a guard, which can be removed" if guard else "") if part),
        seeds=seeds,
        scores=scores,
        targets=_ua_by_target(list(cells.values())),
        relapse=_mean([_relapse(result["relapse"]) for result in results]),
        fid=_mean([(result["extra"] or {}).get("fid") for result in results]),
        kid=_mean([(result["extra"] or {}).get("kid") for result in results]),
        extra=_other_metrics(results),
        attacks=attacks,
        asr=asr,
        h4=None if asr is None else harmonic({**means, "1 - ASR": 1 - asr}, ROBUST),
        passes=_mean(passes) or 0.0,
        cpu_seconds=_mean([(part["prepare"] + part["train"]) / num_concepts for part in cpu_seconds]) or 0.0,
        peak_memory=_mean([max(result["peak_memory_bytes"]) / MEGA for result in results]) or 0.0,
        trained=num_trained,
        stored=(guard["bytes"] if guard else num_trained * BYTES[first.dtype]) / MEGA,
        images=tuple(path for path in _shown_images(first, images) if path.is_file()),
    )


def _shown_images(cell: FinishedCell, folder: Path) -> list[Path]:
    """Six objects, targets first, in two styles each."""
    targets = [concept.target for concept in cell.concepts if concept.kind == "object"]
    kept = [name for name in cell.world.objects if normal(name) not in map(normal, targets)]
    styles = (cell.world.styles or (None,))[:2]
    return [folder / image_name(name, style) for name in [*targets, *kept][:6] for style in styles]


def _other_metrics(results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The mean over seeds of every metric result that has no column of its own."""
    extras = [result["extra"] or {} for result in results]
    names = sorted({name for extra in extras for name in extra} - {"fid", "kid"})
    return {name: _mean([extra.get(name) for extra in extras]) for name in names}


def _attacks(results: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, list[float] | None]]:
    """The rate of every attack that judged images, over all seeds."""
    of_seeds = [(result.get("attacks") or {}).get("attacks") or {} for result in results]
    names = dict.fromkeys(name for rates in of_seeds for name in rates)
    judged = {
        name: [
            {"cases": (rates[name].get("classifier") or {}).get("cases", 0), **rates[name]}
            for rates in of_seeds
            if name in rates
        ]
        for name in names
    }
    return {name: rate for name, rates in judged.items() if (rate := pooled_rate(rates)) is not None}


def _scores(cells: Mapping[int, FinishedCell], base: Mapping[int, FinishedCell]) -> dict[str, Score]:
    """Every score of a row; differences cover the seeds that both rows have."""
    row_counts = {seed: _counts(cell) for seed, cell in cells.items()}
    base_counts = {seed: _counts(cell) for seed, cell in base.items() if seed in row_counts}
    whole = stacked([row_counts[seed] for seed in sorted(row_counts)])
    means, samples = score_means(whole), _resampled(whole)
    differences = _differences(row_counts, base_counts) if base_counts else {}
    # One prompt and one seed say nothing about others: no interval.
    single = {name for name, (_, num_images) in whole.items() if (num_images > 0).sum() < 2}
    if single & set(HARMONIC) & set(means):
        single.add("H")
    scores = {}
    for name in TABLE_SCORES:
        if name in means:
            difference, difference_interval = differences.get(name, (None, None))
            scores[name] = Score(
                means[name],
                None if name in single else percentiles(samples[name]),
                difference,
                None if name in single else difference_interval,
            )
    return scores


def _differences(
    row: Mapping[int, Counts], base: Mapping[int, Counts]
) -> dict[str, tuple[float, tuple[float, float] | None]]:
    """The difference of each score to the base row and its interval, over the seeds of `base`."""
    row_counts, base_counts = (stacked([counts[seed] for seed in sorted(base)]) for counts in (row, base))
    row_means, base_means = score_means(row_counts), score_means(base_counts)
    row_samples, base_samples = _resampled(row_counts), _resampled(base_counts)  # the same rounds: a paired bootstrap
    return {
        name: (row_means[name] - base_means[name], percentiles(row_samples[name] - base_samples[name]))
        for name in row_means
        if name in base_means
    }


def _counts(cell: FinishedCell) -> Counts:
    """What each prompt of a cell adds to each score, [P]."""
    answers = _answers(cell)
    targets = score_targets(cell.concepts, cell.world)
    return per_prompt(answers, score_counts(answers, targets, held_objects(cell.world)))[1]


def _answers(cell: FinishedCell) -> Answers:
    columns = cell.result["answers"]
    return Answers(
        prompt=np.array(columns["prompt"]),
        object_asked=np.array(columns["object_asked"]),
        style_asked=np.array(columns["style_asked"]),
        object_seen=np.array(columns["object_seen"]),
        style_seen=None if columns["style_seen"] is None else np.array(columns["style_seen"]),
    )


def _ua_by_target(cells: Sequence[FinishedCell]) -> dict[str, float | None]:
    """UA of each target alone, averaged over seeds; every seed has the same number of images of it."""
    concepts, world = cells[0].concepts, cells[0].world
    alone = [
        [unlearning_scores(_answers(cell), [target])["UA"] for cell in cells]
        for target in score_targets(concepts, world)
    ]
    return {concept.target: _mean(by_seed) for concept, by_seed in zip(concepts, alone)}


def _resampled(counts: Counts) -> dict[str, np.ndarray]:
    num_seeds, num_prompts = next(iter(counts.values()))[0].shape
    return resampled_scores(counts, resampling(num_seeds, num_prompts, ROUNDS))


def _relapse(accuracies: Sequence[Sequence[float | None] | None]) -> float | None:
    """Mean over all targets but the last: accuracy after the last concept, minus that right after the target's own.

    None if stages are missing.
    """
    last = len(accuracies) - 1
    rows = [row or [None] * len(accuracies) for row in accuracies]  # a long run leaves out those without scores
    pairs = [(rows[last][k], rows[k][k]) for k in range(last)]
    return _mean([after - before for after, before in pairs if after is not None and before is not None])


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
