"""Which blocks to train: a short run of its own for every block, judged by the images that it draws (SurgUn, arXiv 2603.00975).

Known from the abstract alone: blocks are chosen by how generated images erase and retain. A reconstruction: the score
UA + (IRA + CRA) / 2 of a small grid of images, by other seeds than a run's own evaluation has, and a quarter of the steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sculpt_dist.config.load import load_config
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import derived_seed, write_atomically
from sculpt_dist.experiments.compare import finished_report
from sculpt_dist.experiments.jobs import Job, run_jobs
from sculpt_dist.methods.base import load_method
from sculpt_dist.run.fingerprint import config_fingerprint
from sculpt_dist.run.model import open_backbone
from sculpt_dist.run.preflight import META_GROUP


@dataclass(frozen=True)
class BlockRun:
    """The short run in which one block alone trains."""

    block: int
    overrides: tuple[str, ...]
    config: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)

    @property
    def scores(self) -> dict[str, Any] | None:
        """UA, IRA, CRA and their score; None while the run has not ended."""
        report = finished_report(self.folder, config_fingerprint(self.config))
        if report is None:
            return None
        found = {name: report["after"][name] for name in ("UA", "IRA", "CRA")}
        retained = [found[name] for name in ("IRA", "CRA") if found[name] is not None]
        return (
            {"block": self.block}
            | found
            | {"score": found["UA"] + (sum(retained) / len(retained) if retained else 0.0)}
        )


def run_localization(
    file: Path,
    overrides: Sequence[str] = (),
    best: int = 2,
    index: int | None = None,
    parallel: int = 1,
    ranks: int = 1,
) -> tuple[Path, list[dict[str, Any]]]:
    """Run what is missing of the blocks' runs; returns (RUN-localize, the scores of all blocks, the best first).

    A run has a quarter of the file's steps and one image per object and style, by templates alone, unless `overrides` say otherwise. With
    `index` only that block's run is made, as one task of a job array, and nothing is ranked. Called without it, afterwards, it ranks and
    writes localize.json. Raises ConfigError when the method cannot train single blocks, when evaluation is off, or when a run failed;
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
    jobs = [Job(f"block {run.block}", ("unlearn", str(file), *run.overrides), run.folder) for run in todo]
    failed = run_jobs(
        jobs, parallel, ranks, lambda job, failure: print(f"{job.label}: {failure or 'done'}", flush=True)
    )
    if failed:
        raise ConfigError("; ".join(f"{label}: {failure}" for label, failure in failed.items()))
    folder = runs[0].folder.parent
    if index is not None:
        return folder, []
    ranked = sorted((scores for run in runs if (scores := run.scores)), key=lambda scores: -scores["score"])
    choice = sorted(scores["block"] for scores in ranked[:best])
    write_atomically(
        folder / "localize.json", (json.dumps({"blocks": ranked, "best": choice}, indent=1) + "\n").encode()
    )
    return folder, ranked


def block_runs(file: Path, overrides: Sequence[str]) -> list[BlockRun]:
    """A run for every block in which the method has something to train."""
    config = load_config(file, list(overrides))
    if not config.evaluate.enabled:
        raise ConfigError("evaluate.enabled=false: blocks are judged by the images that they draw")
    _with_block(config, file, overrides, 0)  # says when the method has no option `blocks`
    groups = open_backbone(config.model, META_GROUP, Path(config.run.folder)).groups()
    numbers = range(sum(name.startswith("block.") for name in groups))
    runs = [_with_block(config, file, overrides, number) for number in numbers]
    return [run for run in runs if _trains(run.config, groups)]


def _trains(config: RunConfig, groups: Any) -> bool:
    try:
        return bool(load_method(config.method).trainable(groups))
    except ConfigError:
        return False


def _with_block(config: RunConfig, file: Path, overrides: Sequence[str], block: int) -> BlockRun:
    seed = derived_seed(config.evaluate.seed, "localize") % 2**31
    plain = [
        f"evaluate.{name}=null" for name in ("prompts", "retain_prompts", "reference", "clip", "metrics")
    ]  # lists may say the reported seeds
    short = (
        f"train.steps={max(1, config.train.steps // 4)}",
        "evaluate.images=1",
        "evaluate.paraphrases=[]",
        f"evaluate.seed={seed}",
        *plain,
    )
    mine = (f"method.blocks=[{block}]", f"run.folder={config.run.folder}-localize/block-{block:02d}")
    given = (*short, *overrides, *mine)
    made = load_config(file, list(given))
    load_method(made.method)
    return BlockRun(block, given, made)
