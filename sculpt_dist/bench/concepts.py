"""Measures whether a concept costs the same late in a long run as early: time, memory, open files, bytes and reports.

Runs the whole sequence on a shipped canvas model with synthetic names: two samples per concept and stream, one collect
step and one update, no evaluation. `track/sinks/usage.py` counts what the process takes by each concept.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice, pairwise, product
from pathlib import Path
from statistics import mean, median
from string import ascii_lowercase
from typing import Any

from sculpt_dist.config.load import load_config
from sculpt_dist.config.schema import Concept
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import by_number
from sculpt_dist.run.sequence import run_sequence
from sculpt_dist.track.sinks.usage import FILE
from sculpt_dist.worlds.canvas.world import WORLD

FEWEST, MOST = 20, 17_000
SETTINGS = [
    *("prepare.samples=2", "prepare.steps=1", "prepare.guidance=1", "train.steps=1", "train.batch=2"),
    *("mask.collect=1", "mask.refresh=0", "evaluate.enabled=false", "track.sinks=[usage]"),
]
COUNTS = ("cpu_seconds", "reads", "bytes_read", "writes", "bytes_written")  # grow from concept to concept
LEVELS = ("memory_bytes", "open_files")

Line = dict[str, Any]  # one of usage.jsonl


def bench_concepts(num_concepts: int, overrides: Sequence[str], folder: Path | None = None) -> dict[str, Any]:
    """Figures per concept, of the first and the last tenth of the concepts; and the sizes of what the run wrote.

    Seconds are a median, other counts a mean over a tenth, levels those of its last concept. `folder` keeps the run,
    which a second call continues; None: a temporary one. All ranks call it; the figures are those of the first. Raises
    ConfigError for too few or too many concepts, and for settings that a run refuses.
    """
    if not FEWEST <= num_concepts <= MOST:
        raise ConfigError(f"--concepts {num_concepts}: must be from {FEWEST} to {MOST:,}")
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder)) as place:
        config = load_config(None, [*SETTINGS, *overrides, f"run.folder={place}"])
        concepts = [Concept(target=name, superclass="animal") for name in synthetic_names(num_concepts)]
        run = run_sequence(replace(config, concepts=concepts)).folder
        return {"concepts": num_concepts, **usage_by_tenth(read_usage(run / FILE), num_concepts), **written_sizes(run)}


def synthetic_names(count: int) -> list[str]:
    """Different names of three letters, short enough for the canvas's tokenizers, that are no words of theirs."""
    names = ("".join(letters) for letters in product(ascii_lowercase, repeat=3))
    return list(islice((name for name in names if name not in WORLD.words), count))


def read_usage(file: Path) -> list[Line]:
    """The usage by each concept, in order; of a concept that a later session repeated, the later one."""
    lines = [json.loads(text) for text in file.read_text().splitlines()] if file.is_file() else []
    return list({line["concept"]: line for line in lines}.values())


def usage_by_tenth(lines: Sequence[Line], num_concepts: int) -> dict[str, Any]:
    """`first_seconds`, `last_seconds` and so on, and how many times as long a concept of the last tenth takes."""
    taken = {line["concept"]: _between(line, after) for line, after in pairwise(lines) if _follows(line, after)}
    size = num_concepts // 10
    tenths = {"first": range(size), "last": range(num_concepts - size, num_concepts)}
    found: dict[str, Any] = {}
    for tenth, places in tenths.items():
        of_tenth = [taken[place] for place in places if place in taken]
        for name in of_tenth[0] if of_tenth else ():
            values = [counts[name] for counts in of_tenth]
            average = median if name == "seconds" else mean
            found[f"{tenth}_{name}"] = values[-1] if name in LEVELS else average(values)
    if {"first_seconds", "last_seconds"} <= found.keys():
        found["last_over_first_seconds"] = found["last_seconds"] / found["first_seconds"]
    return found


def _follows(line: Line, after: Line) -> bool:
    """Whether nothing lies between two concepts but the first one."""
    return bool(line["session"] == after["session"] and line["concept"] + 1 == after["concept"])


def _between(line: Line, after: Line) -> dict[str, float]:
    """What a concept took, from its first step to that of the next one, and the levels at that time."""
    counts = {name: after[name] - line[name] for name in COUNTS if name in after}
    return {
        "seconds": after["time"] - line["time"],
        **counts,
        **{name: after[name] for name in LEVELS if name in after},
    }


def written_sizes(run: Path) -> dict[str, Any]:
    """The bytes of the files that describe a run, and the number and sizes of the pages of its report."""
    pages = [page.stat().st_size for page in (run / "report").glob("*.html")]
    files = {
        "report_json": run / "report" / "report.json",
        "card": run / "model" / "README.md",
        "config": run / "config.yaml",
        "manifest": run / "manifest.json",
        "metrics": run / "metrics.jsonl",
    }
    checkpoints = sorted((run / "checkpoints").glob("step-*"), key=by_number)
    if checkpoints:  # a closed form has none
        files["checkpoint_manifest"] = checkpoints[-1] / "manifest.json"
    sizes = {f"{name}_bytes": file.stat().st_size for name, file in files.items()}
    return {"report_pages": len(pages), "largest_page_bytes": max(pages), **sizes}
