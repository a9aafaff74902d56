"""The commands that start many runs: comparisons, sweeps, and the search for blocks."""

from __future__ import annotations

from pathlib import Path

import typer

from sculpt_dist.cli.options import CONFIG, GPUS, JOBS, OVERRIDES, RANKS
from sculpt_dist.core.errors import ConfigError

ONLY_SUMMARY = typer.Option(True, help="Run what is missing; --no-run only summarises what is done.")


def compare(
    config: Path = typer.Argument(help="A comparison file, or a packaged one, for example compare/canvas."),
    overrides: list[str] | None = OVERRIDES,
    jobs: int = JOBS,
    ranks: int = RANKS,
    gpus: int | None = GPUS,
    shard: str | None = typer.Option(
        None, help="i/n: run every n-th cell from the i-th (0 on), without tables. For a job array."
    ),
    run: bool = ONLY_SUMMARY,
) -> None:
    """Run methods x models x sequences x seeds, each in its own run folder; write tables and a page. Resumes."""
    from sculpt_dist.experiments.compare import run_comparison

    print(f"comparison: {run_comparison(config, overrides or [], jobs, ranks, _shard(shard), run, gpus)}")


def localize(
    config: Path = CONFIG,
    overrides: list[str] | None = OVERRIDES,
    best: int = typer.Option(2, help="How many blocks to choose."),
    index: int | None = typer.Option(
        None, help="Run this block alone, as a task of a job array; a last call without it ranks the blocks."
    ),
    jobs: int = JOBS,
    ranks: int = RANKS,
    gpus: int | None = GPUS,
) -> None:
    """Find the blocks that erase and retain best, by a short run of each. For methods with `blocks`, such as surgun."""
    from sculpt_dist.experiments.localize import run_localization

    folder, ranked = run_localization(config, overrides or [], best, index, jobs, ranks, gpus)
    for scores in ranked:
        values = (f"{name} {scores[name]:.3f}" for name in ("score", "UA", "IRA", "CRA") if scores[name] is not None)
        print(f"block {scores['block']}:", *values)
    if ranked:
        print(f"best: method.blocks={sorted(scores['block'] for scores in ranked[:best])}")
    print(f"runs: {folder}")


def sweep(
    file: Path = typer.Argument(help="A sweep in W&B's schema, or a packaged one, for example sweeps/canvas-grid."),
    overrides: list[str] | None = OVERRIDES,
    backend: str = typer.Option(
        "local", help="local needs no server; with one use `wandb sweep FILE` and `wandb agent --count 1 SWEEP_ID`."
    ),
    folder: Path | None = typer.Option(None, help="Folder for trials and summary; default: runs/sweeps/NAME."),
    seed: int = typer.Option(0, help="Seed of random and bayes."),
    index: int | None = typer.Option(
        None, help="Run this trial alone, as a task of a job array; a last call without it summarises."
    ),
    jobs: int = JOBS,
    ranks: int = RANKS,
    gpus: int | None = GPUS,
    run: bool = ONLY_SUMMARY,
    show: bool = typer.Option(
        False, "--print", help="With --index: print the trial's arguments, one per line, for your own launcher."
    ),
) -> None:
    """Run the trials of a sweep file that are not done, each in its own run folder, and summarise them. Resumes."""
    from sculpt_dist.experiments.sweep import run_sweep, trial_arguments

    if backend != "local":
        raise ConfigError(
            f"--backend {backend}: with W&B's server run `wandb sweep {file}`, then `wandb agent --count 1 SWEEP_ID` "
            "in each job"
        )
    if show:
        if index is None:
            raise ConfigError("--print: name a trial with --index")
        print("\n".join(trial_arguments(file, overrides or [], folder, seed, index)))
        return
    where = run_sweep(file, overrides or [], folder, seed, index, jobs, ranks, run, gpus)
    print(f"trials: {where / 'trials'}" if index is not None else f"sweep: {where / 'sweep.html'}")


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit()):
        raise ConfigError(f"--shard {text}: write i/n, for example 0/4")
    return int(first), int(second)
