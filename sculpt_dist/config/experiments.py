"""The keys of a comparison file and of a sweep file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from sculpt_dist.config.schema import Concept


@dataclass(frozen=True)
class Row:
    """A method and its settings: a row of the tables."""

    name: str = MISSING
    """Name of the row."""
    config: str = MISSING
    """Yaml file of its configuration, relative to the comparison file."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of that configuration, key=value."""
    per_backbone: dict[str, list[str]] = field(default_factory=dict)
    """Additional overrides by backbone."""
    note: str = ""
    """Note printed beside the row's name."""


@dataclass(frozen=True)
class Table:
    """One table of a comparison: its rows on each backbone, over all seeds."""

    title: str = MISSING
    """Heading of the table."""
    sequence: str = MISSING
    """Name of the sequence of concepts."""
    backbones: list[str] = field(default_factory=list)
    """Kinds of model; each gets a table."""
    rows: list[str] = field(default_factory=list)
    """Names of its rows; empty means all."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """Seeds of every cell."""
    witness: bool = False
    """Whether the scores are those of `evaluate.witness`."""


@dataclass(frozen=True)
class Comparison:
    """A comparison file (see experiments/compare.py)."""

    folder: str = MISSING
    """Folder for the runs of all cells, the tables and the page."""
    record: str = ""
    """File with the results of every finished cell, so that another machine does not run it again."""
    against: str = MISSING
    """Row that all others are compared with."""
    sequences: dict[str, list[Concept]] = field(default_factory=dict)
    """Named sequences of concepts."""
    rows: list[Row] = field(default_factory=list)
    """The methods."""
    tables: list[Table] = field(default_factory=list)
    """The tables."""
    overrides: list[str] = field(default_factory=list)
    """Overrides for every cell."""
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

    `parameters` and `command` are read separately. Keys that only the server uses are accepted and have no effect here.
    """

    method: str = MISSING
    """grid, random or bayes."""
    metric: Metric = field(default_factory=Metric)
    """What to optimise."""
    run_cap: int | None = None
    """Largest number of trials; required for random and bayes."""
    name: str | None = None
    """Name of the sweep; null takes the file's name."""
    early_terminate: dict[str, Any] | None = None
    """Needs W&B's server; refused here."""
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
