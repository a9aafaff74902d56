"""The commands that look ahead: what a configuration would train and need, and where its run would be."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from sculpt_dist.cli.options import CONFIG, OVERRIDES, load


def check(
    config: Path = CONFIG,
    overrides: list[str] | None = OVERRIDES,
    ranks: int = typer.Option(1, help="Ranks of the run."),
) -> None:
    """Check CONFIG against its model's settings and count what would train; needs no weights and no GPU."""
    loaded = load(config, overrides)
    from sculpt_dist.cli.console import print_check
    from sculpt_dist.planning.check import check_run

    print_check(check_run(loaded, ranks))


def plan(
    config: Path = CONFIG,
    overrides: list[str] | None = OVERRIDES,
    ranks: int = typer.Option(1, help="Ranks of the run, one per GPU."),
    memory: float = typer.Option(80.0, help="GB (1e9 bytes) of each rank."),
    device: str = typer.Option("cuda", help="Device of the ranks: cuda or cpu."),
    flops: float | None = typer.Option(None, help="Operations per second of a rank, for example 3e14."),
    bandwidth: float | None = typer.Option(None, help="GB/s of a rank's link; 10 if unknown."),
    latency: float | None = typer.Option(
        None, help="Microseconds of a small collective between two ranks; 50 if unknown."
    ),
    rates: list[Path] = typer.Option([], help="JSON that a bench printed, for rates that are not given; repeatable."),
    as_json: bool = typer.Option(False, "--json", help="The last line of stdout is one JSON object."),
) -> None:
    """Compute the memory, traffic and time that CONFIG needs, and the cheapest change that makes it fit."""
    loaded = load(config, overrides)
    from sculpt_dist.cli.console import print_plan
    from sculpt_dist.planning.plan import GIGA, plan_run
    from sculpt_dist.planning.rates import read_rates

    known = read_rates(rates, flops, bandwidth, latency)
    found = plan_run(loaded, ranks, memory * GIGA, known, device)
    if as_json:
        print(json.dumps(found))
    else:
        print_plan(found)


def folder(config: Path = CONFIG, overrides: list[str] | None = OVERRIDES) -> None:
    """Print the run folder of CONFIG, for scripts."""
    from sculpt_dist.config.load import load_config

    print(load_config(config, overrides or []).run.folder)
