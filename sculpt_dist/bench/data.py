"""Measures how fast the loader reads the samples of a run, without the net."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import TextCond
from sculpt_dist.data.prompts import concept_prompts
from sculpt_dist.data.shards import ShardReader
from sculpt_dist.data.streams import load, micro_batches
from sculpt_dist.engine.group import Group
from sculpt_dist.run.model import open_backbone
from sculpt_dist.run.prepare import drawn_sources
from sculpt_dist.run.setup import RunSetup
from sculpt_dist.run.trainer import concept_streams

PLENTY = 1 << 20  # steps: more than the time allows


def bench_data(setup: RunSetup, group: Group, seconds: float) -> dict[str, Any]:
    """Samples per second of one rank: for each role read from shards, and for all roles as batches on the device.

    Reads the streams of the last concept with `train.workers` for `seconds` after a first batch. All ranks must call
    it; the figures of the first rank count. `run_seconds_per_step` is the median over the training steps that the run
    has made, None without any. `loader_over_step` is the time to read the samples of a step, without reading ahead,
    divided by that median.

    Raises ShardError if the samples are missing, and ConfigError for a method that reads none.
    """
    config = setup.config
    if setup.plan is None or not drawn_sources(setup.trained[0]):
        raise ConfigError(f"method.name={setup.method_name}: reads no samples; choose a method that does")
    if not seconds > 0:
        raise ConfigError(f"--seconds {seconds:g}: must be above 0")
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
            found[f"{role}_samples_per_second"] = micro * _per_second(lambda: load(alone, items, workers), seconds)  # noqa: B023 (called within this iteration)
    prompts = concept_prompts(config.concepts[number], config.prepare)
    together = _per_second(lambda: micro_batches(streams, _no_text, prompts, group.device, 0, PLENTY, workers), seconds)
    found |= {"samples_per_second": micro * together, "seconds_per_step": accumulate / together}
    taken = _step_seconds(setup.folder)
    found["run_seconds_per_step"] = statistics.median(taken) if taken else None
    found["loader_over_step"] = found["seconds_per_step"] / found["run_seconds_per_step"] if taken else None
    return found


def _no_text(prompts: Sequence[str]) -> TextCond:
    """Empty embeddings: a run keeps its embeddings in memory, so loading does not include them."""
    return TextCond(torch.empty(len(prompts), 0, 0))


def _per_second(batches: Callable[[], Iterable[Any]], seconds: float) -> float:
    reading = iter(batches())
    next(reading)  # starts the workers and opens the files
    gc.freeze()  # a garbage collection of everything loaded so far takes up to 0.4 s and would count as reading
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(reading)
        count += 1
    taken = time.perf_counter() - began
    gc.unfreeze()
    return count / taken


def _step_seconds(folder: Path) -> list[float]:
    """The duration of every training step in metrics.jsonl."""
    file = folder / "metrics.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines() if line] if file.is_file() else []
    return [entry["seconds"] for entry in entries if entry.get("phase") == "train"]
