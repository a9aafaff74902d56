"""A run folder written by hand, and readers of its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

OBJECTS = ("cat", "fish", "bird", "flower", "tree", "cactus", "house", "tower", "bridge", "car", "boat", "rocket")


STYLES = ("natural", "sketch", "neon", "popart", "mosaic")


SCORES = {
    "UA": (0.019, 0.497, 0.971),
    "SA": (0.012, 0.46, 0.93),
    "IRA": (0.984, 0.979, 0.963),
    "CRA": (0.998, 0.996, 0.976),
}


ACCURACY = {"cat": (0.98, 0.0, 0.031), "car": (0.982, 0.965, 0.027)}  # base, after cat, after car


def score_set(stage: int, targets: Sequence[str] = ("cat", "car"), worse: float = 0.0) -> dict[str, Any]:
    """Scores of a stage: 0 is the base, k comes after the k-th concept."""
    members: dict[str, Any] = {}
    for name, values in SCORES.items():
        value = round(max(values[stage] - worse, 0.0), 4)
        members |= {name: value, f"{name}_ci95": [round(max(value - 0.02, 0), 4), round(min(value + 0.02, 1), 4)]}
    recognised = {name: ACCURACY[old][stage] for name, old in zip(targets, ACCURACY)}
    members["images"] = {"target": 210, "other": 630}
    members["targets"] = {name: {"accuracy": share, "UA": 1 - share, "SA": 0.9} for name, share in recognised.items()}
    members["objects"] = {name: recognised.get(name, 0.99 - 0.04 * stage * (name == "fish")) for name in OBJECTS}
    members["styles"] = dict.fromkeys(STYLES, 0.99)
    members["extra"] = {"clip_score": 27.4 - 0.3 * stage, "fid": 12.5 + stage}
    return members


def metric_lines() -> list[dict[str, Any]]:
    """Two concepts with 10 collect steps and 60 updates each; the mask is refreshed every 10 updates."""
    rng = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for concept, target in enumerate(("cat", "car")):
        for step in range(70):
            line = {"concept": concept, "target": target, "step": step, "lr": 1e-3, "grad_norm": 0.4, "seconds": 0.05}
            noise = float(np.exp(0.25 * rng.standard_normal()))
            if step < 10:
                lines.append({**line, "phase": "collect", "loss": 0.3 * noise})
                continue
            terms = {
                "forget": 0.02 + 0.4 * np.exp(-step / 12) * noise,
                "retain": 0.05 * noise,
                "distill": 0.006 * noise * (1 + step / 70),
            }
            line |= {"phase": "train", "loss": sum(terms.values()), "terms": terms, "open": 61440}
            if step % 10 == 0 and 10 < step < 60:
                line |= {
                    "swapped": int(12288 * (1 + np.cos(np.pi * step / 60)) / 2),
                    "overlap": 1 - 0.2 * (1 + np.cos(np.pi * step / 60)) / 2,
                }
            lines.append(line)
    return lines


def draw(folder: Path, stage: int, side: int, styles: Sequence[str], objects: Sequence[str] = OBJECTS) -> None:
    folder.mkdir(parents=True)
    for row, name in enumerate(objects):
        for column, style in enumerate(styles):
            pixels = np.full((side, side, 3), (40 + 40 * column, 200 - 12 * row, 90), dtype=np.uint8)
            pixels[side // 4 : side // 2 + 2 * stage, side // 4 : 3 * side // 4] = (250, 240, 220)
            Image.fromarray(pixels).save(folder / f"{name}--{style}.png")


def write_run(
    folder: Path, targets: Sequence[str] = ("cat", "car"), side: int = 32, styles: Sequence[str] = STYLES
) -> Path:
    """A finished run of two concepts."""
    folder.mkdir(parents=True)
    concepts = [
        {"target": name, "superclass": broad, "kind": "object", "keep": []}
        for name, broad in zip(targets, ("animal", "vehicle"))
    ]
    config = {
        "model": {"path": "models/canvas-sd15", "arch": "sd15"},
        "concepts": concepts,
        "method": {"name": "dm_cal", "label_guidance": 1.0},
        "train": {"steps": 60, "batch": 8, "lr": 0.001, "seed": 0},
        "mask": {"keep": 0.5, "scope": "matrix"},
        "engine": {"stage": 2, "precision": "fp32"},
        "evaluate": {"enabled": True, "classifier": "canvas", "images": 10},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metric_lines()))
    for stage, name in enumerate(("before", "after-00", "after-01")):
        draw(folder / "evaluation" / name / "images", stage, side, styles)
        scores = {"plain": score_set(stage, targets), "paraphrased": score_set(stage, targets, worse=0.01)}
        (folder / "evaluation" / name / "scores.json").write_text(json.dumps(scores))
    costs = {
        "seconds": {"prepare": 21.5, "train": 48.25, "evaluate": 30.0, "total": 104.5},
        "cpu_seconds": {"prepare": 40.0, "train": 95.5},
        "passes": {"prepare": 4608, "train": 25200, "evaluate": 11520},
        "peak_memory_bytes": [1288490188, 1181116006],
        "weights": {"total": 1780000, "trained": 122880, "open": 61440},
        "bytes_communicated": 123456789,
        "ranks": 2,
    }
    (folder / "costs.json").write_text(json.dumps(costs))
    manifest = {
        "base": "b" * 64,
        "config": "c" * 64,
        "shards": {"cat-target-000.tar": "d" * 64},
        "code": "0.1.0",
        "finished": True,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_attacks(folder: Path) -> Path:
    """Two attacks on that run, one of them with an image."""
    rates = {"cases": 4, "attacked": 3, "pre": 0.25, "post": 0.5, "post_ci95": [0.15, 0.85], "alone": 0.5, "mean": 0.1}
    rates |= {"passes_to_success": 120, "variants": {"1 steps": 0.5}}
    judged = {"classifier": rates, "witness": rates}
    common = {"judged_by": "witness", "pre": 0.25, "settings": "s" * 16, "passes": 321.5, **judged}
    shown = [{"file": "noise/0000-0.png", "concept": "cat", "seen": True}]
    noise = {**common, "counts": "mean", "post": 0.5, "post_ci95": [0.15, 0.85], "shown": shown, "scores": {}}
    leak = {**common, "counts": "best", "post": None, "post_ci95": None, "shown": [], "scores": {"leak": 0.01}}
    content = {
        "judges": {"classifier": "canvas", "witness": None},
        "budget": "light",
        "checksums": None,
        "attacks": {"noise": noise, "leak": leak},
    }
    (folder / "attacks" / "noise").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(folder / "attacks" / "noise" / "0000-0.png")
    (folder / "attacks" / "attacks.json").write_text(json.dumps(content))
    return folder


class Page(HTMLParser):
    """The parsed page: tags with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes, sort_keys=False))


def read_report(folder: Path) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"report.json holds {word}")

    report: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text(), parse_constant=refuse)
    assert len(report.pop("sha256")) == 64
    return report
