"""The commands that list what there is: keys of a configuration, methods, kinds of models, metrics and classifiers."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from sculpt_dist.config.packaged import copy_config, packaged_configs
from sculpt_dist.config.reference import reference, summaries
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.plugins import METHODS


def config(
    prefix: str = typer.Argument("", help="Only keys that begin like this, for example train or method.esd."),
) -> None:
    """Print every key of a configuration with its type, default and meaning."""
    keys = reference(prefix)
    if not keys:
        raise ConfigError(f"no key begins with {prefix!r}: `sculpt-dist config` lists all of them")
    table = Table("key", "default", "meaning", show_lines=False)
    for key in keys:
        table.add_row(key.name, key.default or "required", f"{key.meaning} ({key.type})")
    _print(table)


def configs(
    name: str = typer.Argument("", help="Copy this one and what it builds on, for example canvas/dm_cal."),
    folder: Path = typer.Argument(Path("configs"), help="Where to."),
) -> None:
    """List the configurations that come with the program, or copy one, to change it."""
    if name:
        print("\n".join(map(str, copy_config(name, folder))))
        return
    table = Table("configuration", "")
    for packaged, line in packaged_configs().items():
        table.add_row(packaged, line)
    _print(table)


def methods() -> None:
    """List the methods and the guards: the values of method.name."""
    for package in METHODS:
        _list(package)


def models() -> None:
    """List the kinds of models: the values of model.arch."""
    _list("sculpt_dist.backbones")


def attacks() -> None:
    """List the attacks: the values of attack.names and evaluate.attacks."""
    _list("sculpt_dist.attacks")


def metrics() -> None:
    """List the metrics, and the classifiers that evaluate.classifier may name."""
    _list("sculpt_dist.evaluation.metrics")
    _list("sculpt_dist.evaluation.classifiers")


def _list(package: str) -> None:
    table = Table(package.rpartition(".")[2].removesuffix("s"), "")
    for name, line in summaries(package).items():
        table.add_row(name, line)
    _print(table)


def _print(table: Table) -> None:
    console = Console()
    console.print(table) if console.is_terminal else Console(width=200).print(table)
