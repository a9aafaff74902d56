"""Shared by all commands: arguments, completion, reading a configuration, and the rank of this process."""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.plugins import METHODS, Packages, check_plugin, plugins

if TYPE_CHECKING:
    from sculpt_dist.config.schema import RunConfig

NAMED: dict[str, Packages] = {  # keys whose value is the name of a file in a package
    "model.arch": "sculpt_dist.backbones",
    "method.name": METHODS,
    "evaluate.classifier": "sculpt_dist.evaluation.classifiers",
    "evaluate.witness": "sculpt_dist.evaluation.classifiers",
}


def complete_override(incomplete: str) -> list[str]:
    """Completions of key=value: keys, and the values of those that name a model, method or classifier."""
    from sculpt_dist.config.reference import run_keys

    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={name}" for name in plugins(NAMED[key]) if name.startswith(value)] if key in NAMED else []
    keys = [*(entry.name for entry in run_keys() if "[]" not in entry.name and entry.name != "method"), "method.name"]
    return [f"{name}=" for name in keys if name.startswith(key)]


CONFIG = typer.Argument(help="A yaml file, or the name of a packaged one, for example canvas/dm_cal.")
OVERRIDES = typer.Argument(None, help="key=value, for example train.lr=1e-5.", autocompletion=complete_override)
JOBS = typer.Option(1, help="Runs at a time on this machine.")
RANKS = typer.Option(1, help="Processes of each run.")
GPUS = typer.Option(None, "--gpus-per-job", min=0, help="GPUs of each run, taken in turn; default: one per process.")


def load(config: Path | None, overrides: list[str] | None) -> RunConfig:
    """Read a configuration and check all names in it, then announce what takes seconds to load.

    Raises ConfigError and ModelError for a wrong key, name or path before torch is imported.
    """
    from sculpt_dist.backbones.io.find import check_path
    from sculpt_dist.config.load import load_config
    from sculpt_dist.worlds.find import world as find_world

    loaded = load_config(config, overrides or [])
    if config is not None and config.suffix and not config.exists() and is_first():
        print(f"{config}: is not here, so the packaged configuration of that name is used", file=sys.stderr)
    check_plugin(NAMED["model.arch"], loaded.model.arch, "model.arch")
    find_world(loaded.model.world)
    _check_method(loaded.method)
    check_path(loaded.model.path)
    if is_first():
        print("loading torch and diffusers ...", file=sys.stderr, flush=True)
    return loaded


def _check_method(options: dict[str, object]) -> None:
    """Raises ConfigError for an unknown method, and for an option that it does not have."""
    from sculpt_dist.config.reference import method_keys

    name = str(options.get("name", "dm_cal"))
    check_plugin(NAMED["method.name"], name, "method.name")
    known = [key.name for key in method_keys(name)]
    for option in options:
        if f"method.{option}" not in known:
            close = difflib.get_close_matches(f"method.{option}", known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"method.{option}: {name} has no such option.{hint} There are: {', '.join(known)}.")


def is_first() -> bool:
    """Whether this is the first rank of its job, the only one that prints."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def num_ranks() -> int:
    """The number of ranks of this job, as set by its launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
