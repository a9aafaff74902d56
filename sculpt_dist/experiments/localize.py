"""Chooses the blocks to train: each block trains alone in a short run and is scored by its images.

Published in SurgUn (arXiv 2603.00975), of which we had only the abstract: blocks are chosen by how well generated
images erase and retain. Our reconstruction scores UA + (IRA + CRA) / 2 on a small grid of images, after a quarter of
the steps, with seeds that the evaluation of a run does not use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sculpt_dist.config.load import load_config
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import derived_seed, write_atomically
from sculpt_dist.experiments.compare import finished_report
from sculpt_dist.experiments.jobs import Failure, Job, run_jobs, settings_of_many
from sculpt_dist.methods.base import Method, load_method
from sculpt_dist.run.fingerprint import config_fingerprint
from sculpt_dist.run.model import open_backbone
from sculpt_dist.run.preflight import META_GROUP


@dataclass(frozen=True)
class BlockRun:
    """A short run that trains one block alone."""

    block: int
    overrides: tuple[str, ...]
    config: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)

    @property
    def scores(self) -> dict[str, Any] | None:
        """UA, IRA, CRA and the combined score; None until the run is finished."""
        report = finished_report(self.folder, config_fingerprint(self.config))
        if report is None:
            return None
        scores = {name: report["after"][name] for name in ("UA", "IRA", "CRA")}
        retained = [scores[name] for name in ("IRA", "CRA") if scores[name] is not None]
        score = scores["UA"] + (sum(retained) / len(retained) if retained else 0.0)
        return {"block": self.block, **scores, "score": score}


def run_localization(
    file: Path,
    overrides: Sequence[str] = (),
    best: int = 2,
    index: int | None = None,
    parallel: int = 1,
    ranks: int = 1,
    gpus: int | None = None,
) -> tuple[Path, list[dict[str, Any]]]:
    """Run the unfinished blocks and rank all of them. Returns (RUN-localize, scores of all blocks, best first).

    A run has a quarter of the configured steps and evaluates one image per object and style, with template prompts
    only, unless `overrides` say otherwise. With `index` only that block runs, as one task of a job array, and nothing
    is ranked; a later call without `index` ranks the blocks and writes localize.json.

    Raises ConfigError if the method cannot train single blocks, if the evaluation is off, or if a run failed, and
    StopRequested after a signal.
    """
    if best < 1:
        raise ConfigError(f"--best {best}: choose at least one block")
    runs = block_runs(file, overrides)
    if index is not None:
        chosen = [run for run in runs if run.block == index]
        if not chosen:
            raise ConfigError(f"index={index}: no such block; there are: {', '.join(str(run.block) for run in runs)}")
    todo = [run for run in (runs if index is None else chosen) if run.scores is None]
    folder = runs[0].folder.parent
    common = settings_of_many(folder)
    jobs = [Job(f"block {run.block}", ("unlearn", str(file), *common, *run.overrides), run.folder) for run in todo]
    failed = run_jobs(jobs, parallel, ranks, _print_end, gpus)
    if failed:
        raise ConfigError("; ".join(f"{label}: {failure}" for label, failure in failed.items()))
    if index is not None:
        return folder, []
    ranked = sorted((scores for run in runs if (scores := run.scores)), key=lambda scores: -scores["score"])
    choice = sorted(scores["block"] for scores in ranked[:best])
    content = json.dumps({"blocks": ranked, "best": choice}, indent=1) + "\n"
    write_atomically(folder / "localize.json", content.encode())
    return folder, ranked


def _print_end(job: Job, failure: Failure | None) -> None:
    print(f"{job.label}: {failure or 'done'}", flush=True)


def block_runs(file: Path, overrides: Sequence[str]) -> list[BlockRun]:
    """The run of every block in which the method trains something."""
    config = load_config(file, list(overrides))
    if not config.evaluate.enabled:
        raise ConfigError("evaluate.enabled=false: blocks are judged by the images of their runs; set it to true")
    _with_block(config, file, overrides, 0)  # raises if the method has no option `blocks`
    groups = open_backbone(config.model, META_GROUP, Path(config.run.folder)).groups()
    numbers = range(sum(name.startswith("block.") for name in groups))
    runs = [_with_block(config, file, overrides, number) for number in numbers]
    return [run for run in runs if _trains(run.config.method, groups)]


def _trains(options: Mapping[str, Any], groups: Mapping[str, tuple[str, ...]]) -> bool:
    method = load_method(options)
    try:
        return isinstance(method, Method) and bool(method.trainable(groups))
    except ConfigError:  # the block has nothing to train
        return False


def _with_block(config: RunConfig, file: Path, overrides: Sequence[str], block: int) -> BlockRun:
    seed = derived_seed(config.evaluate.seed, "localize") % 2**31
    # Prompt lists may contain the seeds of the reported evaluation.
    plain = [f"evaluate.{name}=null" for name in ("prompts", "retain_prompts", "reference", "clip", "metrics")]
    short = (
        f"train.steps={max(1, config.train.steps // 4)}",
        "evaluate.images=1",
        "evaluate.paraphrases=[]",
        f"evaluate.seed={seed}",
        *plain,
    )
    own = (f"method.blocks=[{block}]", f"run.folder={config.run.folder}-localize/block-{block:02d}")
    given = (*short, *overrides, *own)
    block_config = load_config(file, list(given))
    load_method(block_config.method)
    return BlockRun(block, given, block_config)
