"""How fast the loader reads a run's samples, without the net."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import TextCond
from sculpt_dist.data.prompts import concept_prompts
from sculpt_dist.data.shards import ShardReader
from sculpt_dist.data.streams import load, micro_batches
from sculpt_dist.engine.group import Group
from sculpt_dist.run.model import open_backbone
from sculpt_dist.run.prepare import drawn_sources
from sculpt_dist.run.setup import resolve
from sculpt_dist.run.trainer import concept_streams

PLENTY = 1 << 20  # steps; the clock ends it


def bench_data(config: RunConfig, group: Group, seconds: float) -> dict[str, Any]:
    """Samples per second and rank, of each role that is read from shards and of all roles as batches on the device.

    The last concept's streams with `train.workers`, read for so many seconds after a first batch; all ranks enter, and
    the first one's figures count. `run_seconds_per_step` is the median of the run's training steps where it has made
    some, and
    `loader_over_step` what reading a step's samples takes of that when nothing is read ahead. Raises ShardError where
    the samples are missing, ConfigError for a method that has none.
    """
    setup = resolve(config)
    if setup.plan is None or not drawn_sources(setup.trained[0]):
        raise ConfigError(f"method.name={config.method.get('name')}: reads no samples")
    if not seconds > 0:
        raise ConfigError(f"--seconds {seconds:g}: must be more than 0")
    setup.micro_batch(group.size)
    backbone = open_backbone(config.model, group, setup.folder)
    number = len(config.concepts) - 1
    streams = group.together(lambda: concept_streams(setup, backbone, group, number))
    micro, accumulate, workers = len(streams.layout.positions(0)), config.train.accumulate, config.train.workers
    items = range(PLENTY * accumulate)
    found: dict[str, Any] = {"ranks": group.size, "workers": workers, "micro_batch": micro, "accumulate": accumulate}
    for role, sources in streams.sources.items():
        if any(isinstance(source, ShardReader) for source in sources):
            alone = streams.alone(role)
            found[f"{role}_samples_per_second"] = micro * _per_second(lambda: load(alone, items, workers), seconds)  # noqa: B023 (called within this turn)
    prompts = concept_prompts(config.concepts[number], config.prepare)
    together = _per_second(lambda: micro_batches(streams, _no_text, prompts, group.device, 0, PLENTY, workers), seconds)
    found |= {"samples_per_second": micro * together, "seconds_per_step": accumulate / together}
    taken = _steps_of(Path(config.run.folder))
    found["run_seconds_per_step"] = statistics.median(taken) if taken else None
    found["loader_over_step"] = found["seconds_per_step"] / found["run_seconds_per_step"] if taken else None
    return found


def _no_text(prompts: Sequence[str]) -> TextCond:
    """Embeddings are kept in memory by a run; they are no part of the loading."""
    return TextCond(torch.empty(len(prompts), 0, 0))


def _per_second(batches: Callable[[], Iterable[Any]], seconds: float) -> float:
    reading = iter(batches())
    next(reading)  # workers start, files are opened
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(reading)
        count += 1
    return count / (time.perf_counter() - began)


def _steps_of(folder: Path) -> list[float]:
    """Seconds of the training steps in metrics.jsonl."""
    file = folder / "metrics.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines() if line] if file.is_file() else []
    return [entry["seconds"] for entry in entries if entry.get("phase") == "train"]
