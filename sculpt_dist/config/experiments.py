"""The keys of a comparison file and of a sweep file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from sculpt_dist.config.schema import Concept


@dataclass(frozen=True)
class Row:
    """A method with its settings, as a row of the tables."""

    name: str = MISSING
    """Name of the row."""
    config: str = MISSING
    """Yaml file of its configuration, relative to the comparison file."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of that configuration, key=value."""
    per_backbone: dict[str, list[str]] = field(default_factory=dict)
    """Further overrides for single backbones."""
    note: str = ""
    """Note printed beside the row's name."""


@dataclass(frozen=True)
class Table:
    """A part of a comparison: its rows on each backbone, over the seeds."""

    title: str = MISSING
    """Heading of the table."""
    sequence: str = MISSING
    """Name of the sequence of concepts."""
    backbones: list[str] = field(default_factory=list)
    """Kinds of model, one table each."""
    rows: list[str] = field(default_factory=list)
    """Names of its rows; empty takes all."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """Seeds of each cell."""


@dataclass(frozen=True)
class Comparison:
    """A comparison file (see experiments/compare.py)."""

    folder: str = MISSING
    """Folder of the cells' runs, the tables and the page."""
    record: str = ""
    """File that keeps what the tables need of every cell, so that a finished cell need not run again elsewhere."""
    against: str = MISSING
    """The row to which the differences of the others are taken."""
    sequences: dict[str, list[Concept]] = field(default_factory=dict)
    """Named sequences of concepts."""
    rows: list[Row] = field(default_factory=list)
    """The methods."""
    tables: list[Table] = field(default_factory=list)
    """The tables."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of every cell."""
    notes: list[str] = field(default_factory=list)
    """Notes printed under the tables."""


@dataclass(frozen=True)
class Metric:
    """What a sweep optimises."""

    name: str = MISSING
    """A score of the report: UA, IRA, CRA, SA or H."""
    goal: str = "minimize"
    """minimize or maximize."""


@dataclass(frozen=True)
class SweepFile:
    """A sweep in W&B's own schema (https://docs.wandb.ai/guides/sweeps/sweep-config-keys).

    `parameters` and `command` are read apart. Keys that only the server needs are allowed, and have no effect here.
    """

    method: str = MISSING
    """grid, random or bayes."""
    metric: Metric = field(default_factory=Metric)
    """What to optimise."""
    run_cap: int | None = None
    """Largest number of trials; random and bayes need it."""
    name: str | None = None
    """Name of the sweep; null takes the file's."""
    early_terminate: dict[str, Any] | None = None
    """Needs W&B's server, and is refused here."""
    program: str | None = None
    """For the server."""
    project: str | None = None
    """For the server."""
    entity: str | None = None
    """For the server."""
    description: str | None = None
    """For the server."""
    apiVersion: str | None = None
    """For the server."""
    kind: str | None = None
    """For the server."""
