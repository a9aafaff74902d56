"""A comparison: methods x backbones x concept sequences x seeds.

Each cell is a run folder of its own. This file lists the cells, finds the finished ones and runs the others. `tables`
computes the numbers from the finished cells, and `table_files` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from sculpt_dist.config.experiments import Comparison, Row, Table
from sculpt_dist.config.load import load_config, merge_section, read_yaml
from sculpt_dist.config.packaged import PACKAGED, find_config
from sculpt_dist.config.schema import Concept, EvaluateConfig, RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import is_folder_name, make_folder, read_object, write_atomically
from sculpt_dist.core.messages import shown
from sculpt_dist.evaluation.evaluator import check_evaluation
from sculpt_dist.evaluation.requests import resolve_evaluation
from sculpt_dist.experiments.jobs import Failure, Job, run_jobs, settings_of_many
from sculpt_dist.experiments.table_files import write_tables
from sculpt_dist.experiments.tables import finished_cell
from sculpt_dist.run.attacking import attack_settings, check_attacks, chosen_attacks
from sculpt_dist.run.fingerprint import config_fingerprint
from sculpt_dist.run.setup import resolve

RowRequests = tuple[str, list[tuple[str, int, int]]]  # a row; (prompt, object, style) of all its images


@dataclass(frozen=True)
class Cell:
    """One run: a row of the comparison on one sequence, backbone and seed."""

    sequence: str
    backbone: str
    row: str
    seed: int
    file: Path  # configuration of the row
    overrides: tuple[str, ...]
    folder: Path

    @property
    def key(self) -> str:
        return f"{self.sequence}/{self.backbone}/{self.row}/seed-{self.seed}"


def run_comparison(
    file: Path,
    overrides: Sequence[str] = (),
    parallel: int = 1,
    ranks: int = 1,
    shard: tuple[int, int] | None = None,
    run: bool = True,
    gpus: int | None = None,
) -> Path:
    """Run the unfinished cells of a comparison, write its tables, and return the path of the page.

    `overrides` apply to every cell, which has `ranks` processes and `gpus` GPUs (None: one per rank). With `shard`
    (i, n) only every n-th cell runs, starting at the i-th, and no table is written. With `run=False` no cell runs, and
    the tables cover the finished cells.

    Raises ConfigError before anything runs if the configuration of a cell is invalid, and at the end, after the tables
    of the other cells are written, if a cell failed. Raises StopRequested after a signal.
    """
    file = find_config(file)
    comparison = read_comparison(file)
    cells = list(comparison_cells(comparison, file, overrides))
    configs = checked_configs(cells, ranks)
    _check_witnesses(comparison, [configs[cell.key] for cell in cells])
    place = file.parent / comparison.record if comparison.record else None
    if place is not None and file.is_relative_to(PACKAGED) and not place.parent.is_dir():
        place = None  # the record of the project, which an installed program does not have
    record = read_record(place)
    results = {cell.key: finished(cell, configs[cell.key], record) for cell in cells}
    todo = [cell for cell in cells if results[cell.key] is None]
    if shard is not None:
        index, count = shard
        if not 0 <= index < count:
            raise ConfigError(f"shard {index}/{count}: the first number must be at least 0 and below the second")
        todo = [cell for i, cell in enumerate(cells) if i % count == index and cell in todo]
    page = Path(comparison.folder)
    failed = _run(todo, page, parallel, ranks, gpus) if run else {}
    if shard is None:
        results |= {cell.key: finished(cell, configs[cell.key], record) for cell in todo}
        if place is not None:
            _write_record(
                place,
                record | {key: result for key, result in results.items() if result is not None},
            )
        done = {key: finished_cell(configs[key], result) for key, result in results.items() if result is not None}
        page = write_tables(page, comparison, done)
    if failed:
        reasons = "; ".join(f"{key}: {failure}" for key, failure in failed.items())
        raise ConfigError(f"{len(failed)} of {len(todo)} cells failed: {reasons}")
    return page


def read_comparison(file: Path) -> Comparison:
    """Read a comparison file. Raises ConfigError, which names the file and the wrong key or name."""
    content = cast(dict[str, Any], OmegaConf.to_container(read_yaml(file, Comparison)))
    comparison = merge_section(Comparison, content, str(file), prefix="")
    names = [row.name for row in comparison.rows]
    for name in (*names, *comparison.sequences):
        if not is_folder_name(name):
            raise ConfigError(f"{file}: {shown(name)!r} becomes a folder's name, so write one without slashes")
    if len(set(names)) < len(names) or not comparison.tables:
        raise ConfigError(f"{file}: define at least one table, and give every row a name of its own")
    for key, given, defined in (
        *(("rows", name, names) for table in comparison.tables for name in table.rows),
        *(("sequence", table.sequence, list(comparison.sequences)) for table in comparison.tables),
        ("against", comparison.against, names),
    ):
        if given not in defined:
            raise ConfigError(
                f"{file}: {key} {shown(given)!r} is not defined; choose one of: {shown(', '.join(defined))}"
            )
    return comparison


def comparison_cells(comparison: Comparison, file: Path, overrides: Sequence[str]) -> Iterator[Cell]:
    """Every cell once, table by table and seed by seed, so that the first tables are complete first."""
    seen: set[str] = set()
    for table in comparison.tables:
        for seed in table.seeds:
            for backbone in table.backbones:
                for row in comparison.rows:
                    if table.rows and row.name not in table.rows:
                        continue
                    cell = _cell(comparison, file, overrides, table, backbone, row, seed)
                    if cell.key not in seen:
                        seen.add(cell.key)
                        yield cell


def _cell(
    comparison: Comparison, file: Path, overrides: Sequence[str], table: Table, backbone: str, row: Row, seed: int
) -> Cell:
    concepts = [
        OmegaConf.to_container(OmegaConf.structured(concept)) for concept in comparison.sequences[table.sequence]
    ]
    folder = Path(comparison.folder) / table.sequence / backbone / row.name / f"seed-{seed}"
    given = (*comparison.overrides, *overrides, *row.overrides, *row.per_backbone.get(backbone, ()))
    own = (f"model.arch={backbone}", f"train.seed={seed}", f"concepts={json.dumps(concepts)}", f"run.folder={folder}")
    return Cell(table.sequence, backbone, row.name, seed, file.parent / row.config, (*given, *own), folder)


def checked_configs(cells: Sequence[Cell], ranks: int = 1) -> dict[str, RunConfig]:
    """The configuration of every cell, by the cell's key.

    Raises ConfigError, which names the cell, if a configuration is invalid, has no evaluation, or evaluates other
    images than the other rows of its table.
    """
    first_rows: dict[tuple[str, str], RowRequests] = {}
    configs: dict[str, RunConfig] = {}
    loaded: dict[tuple[str, str, str], RunConfig] = {}
    evaluations: set[str] = set()
    for cell in cells:
        row = (cell.sequence, cell.backbone, cell.row)
        if row not in loaded:  # the seeds of a row differ in seed and folder only
            try:
                loaded[row] = checked_config(cell.file, cell.overrides, evaluations, ranks)
                _check_comparable(cell, loaded[row].evaluate, loaded[row].concepts, first_rows)
            except ConfigError as error:
                raise ConfigError(f"cell {cell.key}: {error}") from error
        config = loaded[row]
        train, run = replace(config.train, seed=cell.seed), replace(config.run, folder=str(cell.folder))
        configs[cell.key] = replace(config, train=train, run=run)
    return configs


def _check_witnesses(comparison: Comparison, configs: Sequence[RunConfig]) -> None:
    """Raises ConfigError for a table by the witness where some cell has none."""
    titles = [table.title for table in comparison.tables if table.witness]
    if titles and any(config.evaluate.witness is None for config in configs):
        raise ConfigError(f"the table {titles[0]!r} has witness: true: give evaluate.witness to every row")


def _check_comparable(
    cell: Cell, evaluate: EvaluateConfig, concepts: Sequence[Concept], first_rows: dict[tuple[str, str], RowRequests]
) -> None:
    """Check that a cell evaluates the same images as the first row, so that prompts can be paired.

    `first_rows`: the first row and its images by (sequence, backbone); a missing entry is added.
    """
    if not evaluate.enabled:
        raise ConfigError("evaluate.enabled=false: a comparison needs the scores of every cell; set it to true")
    evaluation = resolve_evaluation(evaluate, concepts)
    requests = [(request.prompt, request.object, request.style) for request in evaluation.requests]
    first_row, first_requests = first_rows.setdefault((cell.sequence, cell.backbone), (cell.row, requests))
    if requests != first_requests:
        raise ConfigError(
            f"evaluate.*: evaluates other images than the row {first_row}; "
            "use the same evaluation in all rows, because differences are paired by prompt"
        )


def checked_config(file: Path, overrides: Sequence[str], evaluations: set[str], ranks: int = 1) -> RunConfig:
    """Load and check one configuration. Raises ConfigError if it is invalid.

    `evaluations` holds the evaluations checked so far and is updated; each is checked once.
    """
    config = load_config(file, overrides)
    setup = resolve(config)
    setup.micro_batch(ranks)
    if config.evaluate.attacks:
        check_attacks(setup, chosen_attacks(config, config.evaluate.attacks, has_run=True))
    evaluation = repr((config.evaluate, config.concepts))
    if evaluation not in evaluations:
        check_evaluation(resolve_evaluation(config.evaluate, config.concepts))
        evaluations.add(evaluation)
    return config


def finished(cell: Cell, config: RunConfig, record: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The results of a cell, from its run folder or from the record; None until it is finished."""
    recorded = record.get(cell.key)
    if recorded is not None and recorded["config"] == config_fingerprint(config) and _has_attacks(recorded, config):
        return recorded
    content = finished_report(cell.folder, config_fingerprint(config))
    if content is None or not _has_attacks(content, config):
        return None
    last = cell.folder / "evaluation" / f"after-{len(config.concepts) - 1:02d}"
    costs = ("passes", "cpu_seconds", "seconds", "peak_memory_bytes", "weights", "relapse")
    return {
        "key": cell.key,
        "config": content["config"],
        "answers": read_object(last / "answers.json", f"remove {last}; the cell then scores it again"),
        "extra": content["after"]["extra"],
        **({"attacks": _without_images(content["attacks"])} if content.get("attacks") else {}),
        **({"guard": content["guard"]} if content.get("guard") else {}),
    } | {name: content[name] for name in costs}


def _has_attacks(content: Mapping[str, Any], config: RunConfig) -> bool:
    """Whether a cell has the rates of all attacks that its configuration asks for, by the same settings."""
    found = (content.get("attacks") or {}).get("attacks") or {}
    wanted = chosen_attacks(config, config.evaluate.attacks, has_run=True) if config.evaluate.attacks else {}
    return all((found.get(name) or {}).get("settings") == attack_settings(config, one) for name, one in wanted.items())


def _without_images(attacks: Mapping[str, Any]) -> dict[str, Any]:
    """The rates of attacks, without the names of images."""
    rates = {
        name: {key: value for key, value in one.items() if key != "shown"} for name, one in attacks["attacks"].items()
    }
    return {**attacks, "attacks": rates}


def finished_report(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """The content of report.json, if a run with this configuration fingerprint finished in the folder; else None."""
    file = folder / "report" / "report.json"
    content = read_object(file, "remove it; the cell then writes it again") if file.exists() else {}
    return content if content.get("finished") and content.get("config") == fingerprint else None


def read_record(file: Path | None) -> dict[str, dict[str, Any]]:
    """The recorded results by the cell's key; empty without a file."""
    if file is None or not file.is_file():
        return {}
    entries = [json.loads(line) for line in file.read_text().splitlines() if line]
    return {entry["key"]: entry for entry in entries}


def _write_record(file: Path, results: Mapping[str, Any]) -> None:
    """Write one line per cell, sorted by key."""
    lines = [json.dumps(results[key], sort_keys=True) for key in sorted(results)]
    make_folder(file.parent)
    write_atomically(file, ("\n".join(lines) + "\n").encode())


def _run(cells: Sequence[Cell], folder: Path, parallel: int, ranks: int, gpus: int | None) -> dict[str, Failure]:
    done: list[str] = []
    common = settings_of_many(folder)

    def report(job: Job, failure: Failure | None) -> None:
        done.append(job.label)
        print(f"[{len(done)}/{len(cells)}] {job.label}: {failure or 'done'}", flush=True)

    jobs = [Job(cell.key, ("unlearn", str(cell.file), *common, *cell.overrides), cell.folder) for cell in cells]
    return run_jobs(jobs, parallel, ranks, report, gpus)
