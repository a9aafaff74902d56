"""The tables of a comparison, as one page, as Markdown and as JSON; every interval is over prompts and seeds together."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sculpt_dist.config.experiments import Comparison, Table
from sculpt_dist.config.load import normal
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.files import write_atomically
from sculpt_dist.evaluation.requests import World, resolve_evaluation
from sculpt_dist.evaluation.scoring import score_targets
from sculpt_dist.maths.comparison import HARMONIC, percentiles, resampled_scores, resampling, score_means, stacked
from sculpt_dist.maths.scores import Answers, Counts, per_prompt, score_counts, unlearning_scores
from sculpt_dist.report.page import TEMPLATES

SCORES = ("UA", "IRA", "CRA", "SA", "H")
ROUNDS = 4000  # of the bootstrap
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MEGA = 1e6


@dataclass(frozen=True)
class Score:
    mean: float
    interval: tuple[float, float] | None  # 95 %
    difference: float | None  # to the row that is compared against, seed by seed and prompt by prompt
    difference_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Line:
    """One row of a table on one backbone; costs are per run and means over seeds."""

    name: str
    note: str
    seeds: tuple[int, ...]
    scores: Mapping[str, Score]
    targets: Mapping[str, float | None]  # UA of each target alone
    relapse: float | None  # accuracy of earlier targets after the last concept, less that right after each
    fid: float | None
    kid: float | None
    extra: Mapping[str, float | None]  # results of all other metrics
    passes: float  # per concept, drawing and training
    cpu_seconds: float  # per concept, the same
    peak_memory: float  # MB, of one rank
    trained: int  # weights
    stored: float  # MB, of the weights that changed, in the dtype of the export
    images: tuple[Path, ...]  # of the first seed, where its folder is there


def write_tables(
    folder: Path, comparison: Comparison, configs: Mapping[str, RunConfig], results: Mapping[str, Any]
) -> Path:
    """Write compare.{html,md,json} into the folder; returns the page. `results` has None for a cell that is not done."""
    blocks = [
        {
            "title": table.title,
            "backbone": backbone,
            "lines": table_lines(comparison, table, backbone, configs, results),
        }
        for table in comparison.tables
        for backbone in table.backbones
    ]
    folder.mkdir(parents=True, exist_ok=True)
    plain = [block | {"lines": [_as_json(line) for line in block["lines"]]} for block in blocks]
    write_atomically(folder / "compare.json", (json.dumps(plain, indent=1) + "\n").encode())
    write_atomically(folder / "compare.md", as_markdown(comparison, blocks).encode())
    write_atomically(folder / "compare.html", _as_page(comparison, blocks).encode())
    return folder / "compare.html"


def table_lines(
    comparison: Comparison, table: Table, backbone: str, configs: Mapping[str, RunConfig], results: Mapping[str, Any]
) -> list[Line]:
    """The rows of one table on one backbone, of the seeds that are done; a row without any is left out."""

    def of(row: str) -> dict[int, tuple[RunConfig, Mapping[str, Any]]]:
        keys = {seed: f"{table.sequence}/{backbone}/{row}/seed-{seed}" for seed in table.seeds}
        return {seed: (configs[key], results[key]) for seed, key in keys.items() if results.get(key)}

    base = of(comparison.against)
    lines = []
    for row in comparison.rows:
        cells = of(row.name) if not table.rows or row.name in table.rows else {}
        if cells:
            folder = Path(comparison.folder) / table.sequence / backbone / row.name
            lines.append(_line(row.name, row.note, cells, base if row.name != comparison.against else {}, folder))
    return lines


def _line(name: str, note: str, cells: Mapping[int, Any], base: Mapping[int, Any], folder: Path) -> Line:
    seeds = tuple(sorted(cells))
    found = [cells[seed][1] for seed in seeds]
    config = cells[seeds[0]][0]
    concepts = len(config.concepts)
    first = folder / f"seed-{seeds[0]}" / "evaluation" / f"after-{concepts - 1:02d}" / "images"
    world = _world(config)
    targets = [concept.target for concept in config.concepts if concept.kind == "object"]
    shown = [*targets, *(kept for kept in world.objects if normal(kept) not in map(normal, targets))][:6]
    images = [first / f"{object_}--{style}.png" for object_ in shown for style in (world.styles or ("none",))[:2]]
    return Line(
        name=name,
        note=note,
        seeds=seeds,
        scores=_scores(cells, base),
        targets=_of_targets(list(cells.values())),
        relapse=_mean([_relapse(cell["relapse"]) for cell in found]),
        fid=_mean([(cell["extra"] or {}).get("fid") for cell in found]),
        kid=_mean([(cell["extra"] or {}).get("kid") for cell in found]),
        extra=_other_metrics(found),
        passes=_mean([sum(cell["passes"].values()) / concepts for cell in found]) or 0.0,
        cpu_seconds=_mean(
            [(cell["cpu_seconds"]["prepare"] + cell["cpu_seconds"]["train"]) / concepts for cell in found]
        )
        or 0.0,
        peak_memory=_mean([max(cell["peak_memory_bytes"]) / MEGA for cell in found]) or 0.0,
        trained=found[0]["weights"]["trained"],
        stored=found[0]["weights"]["trained"] * BYTES[config.model.dtype] / MEGA,
        images=tuple(path for path in images if path.is_file()),
    )


def _other_metrics(found: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The mean over seeds of every result of a metric that has no column of its own."""
    results = [cell["extra"] or {} for cell in found]
    names = sorted({name for result in results for name in result} - {"fid", "kid"})
    return {name: _mean([result.get(name) for result in results]) for name in names}


def _extra_names(block: Mapping[str, Any]) -> list[str]:
    return sorted({name for line in block["lines"] for name in line.extra})


def _scores(cells: Mapping[int, Any], base: Mapping[int, Any]) -> dict[str, Score]:
    """Every score of a row; differences over the seeds that both rows have."""
    mine = {seed: _counts(*cell) for seed, cell in cells.items()}
    theirs = {seed: _counts(*cell) for seed, cell in base.items() if seed in mine}
    whole = stacked([mine[seed] for seed in sorted(mine)])
    means, drawn = score_means(whole), _resampled(whole)
    differences: dict[str, tuple[float, Any]] = {}
    if theirs:
        pair = [stacked([counts[seed] for seed in sorted(theirs)]) for counts in (mine, theirs)]
        ours, other = (score_means(counts) for counts in pair)
        rounds = [_resampled(counts) for counts in pair]  # the same rounds: both count the same seeds and prompts
        differences = {
            name: (ours[name] - other[name], percentiles(rounds[0][name] - rounds[1][name]))
            for name in ours
            if name in other
        }
    single = {
        name for name, (_, among) in whole.items() if (among > 0).sum() < 2
    }  # of one prompt and seed, which says nothing of others
    single |= {"H"} if single & set(HARMONIC) & set(means) else set()
    differences = {name: (ours, None if name in single else interval) for name, (ours, interval) in differences.items()}
    return {
        name: Score(
            means[name], None if name in single else percentiles(drawn[name]), *differences.get(name, (None, None))
        )
        for name in SCORES
        if name in means
    }


def _counts(config: RunConfig, result: Mapping[str, Any]) -> Counts:
    """What each prompt of a cell adds to each score, [P]."""
    answers = _answers(result)
    return per_prompt(answers, score_counts(answers, score_targets(config.concepts, _world(config))))[1]


def _world(config: RunConfig) -> World:
    return resolve_evaluation(config.evaluate, config.concepts).world


def _answers(result: Mapping[str, Any]) -> Answers:
    told = result["answers"]
    columns = ("prompt", "object_asked", "style_asked", "object_seen", "style_seen")
    return Answers(*(None if told[name] is None else np.array(told[name]) for name in columns))


def _of_targets(cells: Sequence[tuple[RunConfig, Mapping[str, Any]]]) -> dict[str, float | None]:
    """UA of each target alone, the mean over the seeds, which have the same number of images of it."""
    config = cells[0][0]
    targets = score_targets(config.concepts, _world(config))
    alone = [[unlearning_scores(_answers(result), [target])["UA"] for _, result in cells] for target in targets]
    return {concept.target: _mean(seeds) for concept, seeds in zip(config.concepts, alone)}


def _resampled(counts: Counts) -> dict[str, np.ndarray]:
    seeds, prompts = next(iter(counts.values()))[0].shape
    return resampled_scores(counts, resampling(seeds, prompts, ROUNDS))


def _relapse(accuracies: Sequence[Sequence[float | None]]) -> float | None:
    """Mean over all targets but the last: accuracy after the last concept, less that right after it; None where stages are missing."""
    last = len(accuracies) - 1
    pairs = [(accuracies[last][k], accuracies[k][k]) for k in range(last)]
    return _mean([after - before for after, before in pairs if after is not None and before is not None])


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def as_markdown(comparison: Comparison, blocks: Sequence[Mapping[str, Any]]) -> str:
    """The tables as GitHub reads them."""
    parts = []
    for block in blocks:
        heads = [
            "",
            *SCORES,
            "UA of each",
            "relapse",
            "FID",
            "KID",
            *_extra_names(block),
            "passes",
            "CPU-s",
            "MB",
            "trained",
            "stored MB",
            "seeds",
        ]
        rows = [[*_cells(line, comparison.against, _extra_names(block))] for line in block["lines"]]
        table = [heads, ["---"] * len(heads), *rows]
        parts.append(
            f"### {block['title']}, {block['backbone']}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in table)
        )
    return "\n\n".join([*parts, *comparison.notes]) + "\n"


def _cells(line: Line, against: str, extra: Sequence[str]) -> list[str]:
    def score(name: str) -> str:
        found = line.scores.get(name)
        if found is None:
            return "-"
        text = f"{found.mean:.3f}" + (f" [{found.interval[0]:.3f}, {found.interval[1]:.3f}]" if found.interval else "")
        if found.difference is not None and found.difference_interval is not None:
            low, high = found.difference_interval
            text += f" ({found.difference:+.3f}{'*' if low > 0 or high < 0 else ''})"
        return text

    label = line.name + (f" ({line.note})" if line.note else "")
    each = ", ".join(f"{name} {_number(value, '.3f')}" for name, value in line.targets.items())
    numbers = [
        each,
        _number(line.relapse, "+.3f"),
        _number(line.fid, ".2f"),
        _number(line.kid, ".4f"),
        *(_number(line.extra.get(name), ".4g") for name in extra),
        f"{line.passes:,.0f}",
    ]
    numbers += [
        f"{line.cpu_seconds:.1f}",
        f"{line.peak_memory:.0f}",
        f"{line.trained:,}",
        f"{line.stored:.2f}",
        str(len(line.seeds)),
    ]
    return [f"**{label}**" if line.name == against else label, *map(score, SCORES), *numbers]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _as_page(comparison: Comparison, blocks: Sequence[Mapping[str, Any]]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["data_uri"] = lambda path: (
        "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    )
    environment.filters["number"] = _number
    environment.filters["extra_names"] = _extra_names
    return environment.get_template("compare.html").render(comparison=comparison, blocks=blocks, names=SCORES)


def _as_json(line: Line) -> dict[str, Any]:
    content = {name: getattr(line, name) for name in line.__dataclass_fields__ if name != "images"}
    return content | {"scores": {name: vars(score) for name, score in line.scores.items()}}
