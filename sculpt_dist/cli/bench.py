"""The commands of `sculpt-dist bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sculpt_dist.cli.options import is_first, load

if TYPE_CHECKING:
    from sculpt_dist.engine.group import Group

bench_app = typer.Typer(help="Benchmarks: what things cost on this machine, at real sizes.", no_args_is_help=True)
AS_JSON = typer.Option(False, "--json", help="The last line of stdout is one JSON object.")


def _print_figures(measure: Callable[[Group], dict[str, Any]], as_json: bool) -> None:
    """Measure on all ranks of this job, and print on the first."""
    from sculpt_dist.cli.console import print_figures
    from sculpt_dist.engine.group import Group

    group = Group()
    found = measure(group)
    if group.is_first:
        print_figures(found, as_json)


@bench_app.command("mask")
def bench_mask(
    preset: str = typer.Option("sd15", help="Model whose matrices are used: sd15, sdxl or sana."),
    scope: str = typer.Option("matrix", help="matrix or global, as mask.scope."),
    weights: int | None = typer.Option(None, help="Largest number of weights: takes the first matrices only."),
    as_json: bool = AS_JSON,
) -> None:
    """Time a refresh and a masked step on random data, on one rank next to the methods of published code."""
    from sculpt_dist.bench.mask import bench_mask as run

    _print_figures(lambda group: run(preset, scope, group, weights), as_json)


@bench_app.command("step")
def bench_step(
    overrides: list[str] | None = typer.Argument(
        None, help="key=value, for example train.batch=4 model.path=FOLDER engine.stage=3."
    ),
    arch: str = typer.Option("sd15", help="Kind of model; without model.path the shipped one."),
    as_json: bool = AS_JSON,
) -> None:
    """Time a step of the training loop by part, on one rank next to its bare passes and published code."""
    from sculpt_dist.bench.step import bench_step as run

    _print_figures(lambda group: run(arch, overrides or [], group), as_json)


@bench_app.command("draw")
def bench_draw(
    overrides: list[str] | None = typer.Argument(
        None, help="key=value, for example evaluate.batch=8 model.path=FOLDER evaluate.classifier=clip:FOLDER."
    ),
    arch: str = typer.Option("sd15", help="Kind of model; without model.path the shipped one."),
    as_json: bool = AS_JSON,
) -> None:
    """Time drawing and scoring images by part, next to the bare passes of the denoiser that they need."""
    from sculpt_dist.bench.draw import bench_draw as run

    _print_figures(lambda group: run(arch, overrides or [], group), as_json)


@bench_app.command("embed")
def bench_embed(
    overrides: list[str] | None = typer.Argument(None, help="key=value, for example model.text_batch=8."),
    arch: str = typer.Option("sana", help="Kind of model; without model.path the shipped one."),
    prompts: int = typer.Option(2000, help="Number of distinct prompts."),
    as_json: bool = AS_JSON,
) -> None:
    """Time encoding prompts in batches, and measure its memory, next to all of them in one batch."""
    from sculpt_dist.bench.embed import bench_embed as run

    _print_figures(lambda group: run(arch, overrides or [], prompts, group), as_json)


@bench_app.command("edit")
def bench_edit(
    preset: str = typer.Option("sd15", help="Model whose keys and values are edited: sd15, sdxl or sana."),
    concepts: int = typer.Option(1000, help="Number of concepts that are edited at once."),
    as_json: bool = AS_JSON,
) -> None:
    """Time UCE's closed form for many concepts at a real model's size, with random embeddings."""
    from sculpt_dist.bench.edit import bench_edit as run

    _print_figures(lambda group: run(preset, concepts, group), as_json)


@bench_app.command("comm")
def bench_comm(
    megabytes: list[float] = typer.Option([0.1, 1.0, 10.0, 100.0], help="Size in MB; repeatable."),
    as_json: bool = AS_JSON,
) -> None:
    """Time sums, gathers and scatters over the ranks of this job, which is started like a run, for `plan --rates`."""
    from sculpt_dist.bench.comm import bench_comm as run
    from sculpt_dist.cli.console import print_figures
    from sculpt_dist.engine.group import Group

    group = Group(identity="bench comm")
    found = run(group, megabytes)
    if group.is_first:
        rows = [] if as_json else found.pop("collectives")
        named = {f"{row['collective']} of {row['megabytes']:g} MB, GB/s": row["gb_per_second"] for row in rows}
        print_figures(found | named, as_json)


@bench_app.command("data")
def bench_data(
    config: Path = typer.Argument(help="A yaml file whose run has prepared its samples."),
    overrides: list[str] | None = typer.Argument(None, help="key=value, for example train.workers=2."),
    seconds: float = typer.Option(3.0, help="Seconds to read each role, and all together."),
    as_json: bool = AS_JSON,
) -> None:
    """Time how fast the loader reads CONFIG's shards, without the net, and compare with its steps."""
    loaded = load(config, overrides)
    from sculpt_dist.bench.data import bench_data as run
    from sculpt_dist.cli.console import print_figures
    from sculpt_dist.run.setup import resolve

    setup = resolve(loaded)
    group = setup.join_ranks()
    found = run(setup, group, seconds)
    if group.is_first:
        print_figures(found, as_json)


@bench_app.command("concepts")
def bench_concepts(
    overrides: list[str] | None = typer.Argument(None, help="key=value, for example method.name=esd model.arch=sdxl."),
    concepts: int = typer.Option(1000, help="Number of concepts, with synthetic names."),
    folder: Path | None = typer.Option(None, help="Keep the run here; the same command then continues it."),
    as_json: bool = AS_JSON,
) -> None:
    """Run a long sequence on a canvas model, and compare what its first and its last concepts cost."""
    from sculpt_dist.bench.concepts import bench_concepts as run
    from sculpt_dist.cli.console import print_figures

    found = run(concepts, overrides or [], folder)
    if is_first():
        print_figures(found, as_json)
