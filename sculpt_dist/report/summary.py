"""The numbers of a report: what report.json holds, and what the page derives from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sculpt_dist.config.checks import normal
from sculpt_dist.report.record import RunRecord, plain_scores
from sculpt_dist.report.shapes import is_share

SCORES = ("UA", "SA", "IRA", "CRA")


def summarise(run: RunRecord) -> dict[str, Any]:
    """The content of report.json. Scores are shares from 0 to 1; missing values are None."""
    config, costs = run.config, run.costs
    concepts = [
        {
            "target": concept["target"],
            "superclass": concept.get("superclass"),
            "kind": concept.get("kind", "object"),
            **_scores(stage),
        }
        for concept, stage in zip(config["concepts"], list(run.stages.values())[1:])
    ]
    return {
        "model": config["model"].get("path")
        or f"{config['model'].get('world', 'canvas')}-{config['model'].get('arch')}",
        "method": config["method"]["name"],
        "config": run.manifest.get("config"),
        "finished": run.manifest.get("finished", False),
        "notes": run.notes,
        "ranks": costs.get("ranks"),
        "before": _scores(run.stages["before"]),
        "after": _scores(run.stages[run.last] if run.last else {}),
        "concepts": concepts,
        "relapse": [row if not run.is_long or any(map(is_share, row)) else None for row in run.accuracies[1:]],
        "seconds": _members(costs.get("seconds"), ("prepare", "train", "evaluate", "total")),
        "cpu_seconds": {"prepare": None, "train": None, **(costs.get("cpu_seconds") or {})},
        "passes": _members(costs.get("passes"), ("prepare", "train")),
        "peak_memory_bytes": costs.get("peak_memory_bytes"),
        "weights": _members(costs.get("weights"), ("total", "trained", "open")),
        "bytes_communicated": costs.get("bytes_communicated"),
        "attacks": attacks_of(run),
        "guard": _guard_bytes(run.folder),
    }


def attacks_of(run: RunRecord) -> dict[str, Any]:
    """What attacks.json holds, with None for what it lacks; empty where nothing was attacked."""
    found = run.attacks.get("attacks") or {}
    rates = ("pre", "post", "post_ci95", "alone", "mean", "cases", "attacked", "passes_to_success", "variants")
    return found and {
        **_members(run.attacks, ("budget", "checksums")),
        "judges": _members(run.attacks.get("judges"), ("classifier", "witness")),
        "attacks": {
            name: {
                **_members(one, ("pre", "post", "post_ci95", "counts", "scores", "shown", "settings", "passes")),
                "judged_by": one.get("judged_by") or "classifier",
                **{judge: _members(one.get(judge), rates) for judge in ("classifier", "witness")},
            }
            for name, one in found.items()
        },
    }


def seen_counts(report: Mapping[str, Any]) -> list[tuple[str, int, int | None, int | None]]:
    """For each target that a detector counted: (target, images that show it at the end, its images, images before)."""
    before, after = ((report[stage]["targets"] or {}) for stage in ("before", "after"))
    counted = {name: target for name, target in after.items() if target.get("seen") is not None}
    return [
        (name, target["seen"], target.get("images"), before.get(name, {}).get("seen"))
        for name, target in counted.items()
    ]


@dataclass(frozen=True)
class Hurt:
    """An object or a style to keep that lost accuracy: that of the base model, and that after each scored stage."""

    name: str
    base: float
    after: tuple[float | None, ...]

    @property
    def end(self) -> float:
        return next(share for share in reversed(self.after) if share is not None)


def most_hurt(run: RunRecord, most: int) -> list[Hurt]:
    """The objects and styles to keep whose accuracy fell most between the base model and the last scored stage."""
    targets = {normal(target) for target in run.targets}
    stages = [run.stages[name] for name in run.scored_stages]
    found = []
    for kind in ("objects", "styles") if stages else ():
        of_stages = [plain_scores(stage, kind) for stage in stages]
        for name, share in plain_scores(run.stages["before"], kind).items():
            now = of_stages[-1].get(name)
            if share is not None and now is not None and share > now and normal(name) not in targets:
                found.append(Hurt(name, share, tuple(of_stage.get(name) for of_stage in of_stages)))
    return sorted(found, key=lambda hurt: hurt.end - hurt.base)[:most]


def _guard_bytes(folder: Path) -> dict[str, int] | None:
    """Bytes of a run's guard, and of the weights of the model that it guards; None where the run has no guard."""
    model, guard = folder / "model", folder / "model" / "guard"
    if not guard.is_dir():
        return None
    return {
        "bytes": sum(file.stat().st_size for file in guard.iterdir()),
        "model_bytes": sum(file.stat().st_size for file in model.glob("*/*.safetensors") if file.parent != guard),
    }


def _scores(stage: Mapping[str, Any]) -> dict[str, Any]:
    shares = [
        name for score in (*SCORES, "IRA_near", "IRA_far", "IRA_held", "CTA") for name in (score, f"{score}_ci95")
    ]
    names = [*shares, "images", "targets", "extra"]
    others = {kind: _members(stage.get(kind), names) for kind in ("paraphrased", "witness")}
    return {**_members(stage.get("plain"), names), **others}


def _members(record: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Any]:
    return {name: (record or {}).get(name) for name in names}
