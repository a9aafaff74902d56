"""The report of a run: one self-contained page, its numbers as JSON and its figures as PNG, from the files of the run folder alone."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sculpt_dist.config.load import normal
from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.core.files import write_atomically
from sculpt_dist.report.figures import STYLE, draw_loss, draw_mask, draw_relapse
from sculpt_dist.report.grid import Grid, draw_grid, read_grid

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATES = Path(__file__).parent / "templates"
SCORES = ("UA", "SA", "IRA", "CRA")


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds; whatever is missing is empty."""

    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl, one per (concept, step), in order
    num_unreadable: int
    stages: dict[
        str, dict[str, Any]
    ]  # folder name -> scores.json: "before", then "after-00" and on for every concept, empty where missing
    costs: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def targets(self) -> list[str]:
        return [str(concept["target"]) for concept in self.config["concepts"]]

    @property
    def last(self) -> str | None:
        """The last stage that was evaluated, the base not counted."""
        return next((name for name in reversed(self.stages) if name != "before" and self.stages[name]), None)

    @property
    def accuracies(self) -> list[list[float | None]]:
        """Share of each target's images recognised as that target (columns), in every stage (rows), the base first."""
        found = [
            {normal(name): member for name, member in _plain(stage, "targets").items()}
            for stage in self.stages.values()
        ]
        return [[stage.get(normal(target), {}).get("accuracy") for target in self.targets] for stage in found]


def write_report(folder: Path) -> Path:
    """Write `report/` of a run folder and return the path of its page; raises RunFolderError where this is no run folder."""
    run = read_run(Path(folder))
    report = summarise(run)
    grid = _read_grid(run, run.last)
    figures = _draw_figures(run)
    if grid:
        figures["grid"] = _encode(draw_grid(grid), "PNG")
    out = run.folder / "report"
    out.mkdir(exist_ok=True)
    for name, png in figures.items():
        write_atomically(out / f"{name}.png", png)
    write_atomically(out / "report.json", (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    write_atomically(out / "report.html", render(run, report, figures, grid).encode())
    return out / "report.html"


def draw_stage(folder: Path, stage: str) -> Image | None:
    """The grid of samples before and at a stage of a run folder; None where no images were kept."""
    grid = _read_grid(read_run(folder), None if stage == "before" else stage)
    return draw_grid(grid) if grid else None


def read_run(folder: Path) -> RunRecord:
    """Read a run folder, at any time of the run; raises RunFolderError where it has no config, or a file of it is damaged."""
    config = _read_config(folder / "config.yaml")
    names = ["before", *(f"after-{k:02d}" for k in range(len(config["concepts"])))]
    stages = {name: _read_json(folder / "evaluation" / name / "scores.json") for name in names}
    lines, num_unreadable = read_metrics(folder / "metrics.jsonl")
    return RunRecord(
        folder,
        config,
        lines,
        num_unreadable,
        stages,
        _read_json(folder / "costs.json"),
        _read_json(folder / "manifest.json"),
    )


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics.jsonl by (concept, step), the later of two winning, and how many a kill had cut off."""
    if not path.is_file():
        return [], 0
    lines, num_unreadable = {}, 0
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
            lines[line["concept"], line["step"]] = line
        except (
            ValueError,
            KeyError,
            TypeError,
        ):  # cut off; a resumed run writes on behind it, so it need not be the last
            num_unreadable += bool(text.strip())
    return [lines[key] for key in sorted(lines)], num_unreadable


def summarise(run: RunRecord) -> dict[str, Any]:
    """The content of report.json; scores are shares from 0 to 1, and what is missing is None."""
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
        "model": config["model"].get("path") or f"canvas-{config['model'].get('arch')}",
        "method": config["method"]["name"],
        "config": run.manifest.get("config"),
        "finished": run.manifest.get("finished", False),
        "ranks": costs.get("ranks"),
        "before": _scores(run.stages["before"]),
        "after": _scores(run.stages[run.last] if run.last else {}),
        "concepts": concepts,
        "relapse": run.accuracies[1:],
        "seconds": _members(costs.get("seconds"), ("prepare", "train", "evaluate", "total")),
        "cpu_seconds": {"prepare": None, "train": None, **(costs.get("cpu_seconds") or {})},
        "passes": _members(costs.get("passes"), ("prepare", "train")),
        "peak_memory_bytes": costs.get("peak_memory_bytes"),
        "weights": _members(costs.get("weights"), ("total", "trained", "open")),
        "bytes_communicated": costs.get("bytes_communicated"),
    }


def render(run: RunRecord, report: Mapping[str, Any], figures: Mapping[str, bytes], grid: Grid | None) -> str:
    """The page, all images inlined, all text of the user escaped."""
    import jinja2
    from omegaconf import OmegaConf

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["data_uri"] = lambda png: _data_uri(png, "png")
    environment.filters["thumbnail"] = lambda image: _thumbnail_uri(image, grid.is_tiny)
    return environment.get_template("page.html").render(
        report=report,
        config=OmegaConf.to_yaml(OmegaConf.create(run.config)),
        scores=SCORES,
        steps=[concept["target"] for concept in report["concepts"]],
        num_scored=list(run.stages).index(run.last) if run.last else 0,
        accuracies=run.accuracies,
        falls=_falls(run),
        counts=seen_counts(report),
        num_unreadable=run.num_unreadable,
        manifest=run.manifest,
        figures=figures,
        grid=grid,
    )


def _read_grid(run: RunRecord, last: str | None) -> Grid | None:
    names = [name for kind in ("objects", "styles") for stage in run.stages.values() for name in _plain(stage, kind)]
    images = [run.folder / "evaluation" / stage / "images" if stage else None for stage in ("before", last)]
    return read_grid(*images, names=names, targets=run.targets)


def _read_config(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        config = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else None
    except (OmegaConfBaseException, YAMLError) as error:
        raise RunFolderError(
            f"{path} is damaged ({error}): name the output folder of a run, or start the run again"
        ) from error
    if not isinstance(config, dict) or not config.get("concepts"):
        raise RunFolderError(f"{path} is missing or names no concepts: name the output folder of a run")
    return config


def _scores(stage: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for score in (*SCORES, "CTA") for name in (score, f"{score}_ci95")] + ["images", "targets", "extra"]
    return {**_members(stage.get("plain"), names), "paraphrased": _members(stage.get("paraphrased"), names)}


def _plain(stage: Mapping[str, Any], member: str) -> Mapping[str, Any]:
    return (stage.get("plain") or {}).get(member) or {}


def _members(record: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Any]:
    return {name: (record or {}).get(name) for name in names}


def seen_counts(report: Mapping[str, Any]) -> list[tuple[str, int, int, int | None]]:
    """(target, images in which it is seen at the end, its images, images in which it was seen before), where they were counted."""
    then, now = ((report[stage]["targets"] or {}) for stage in ("before", "after"))
    counted = {name: target for name, target in now.items() if target.get("seen") is not None}
    return [
        (name, target["seen"], target["images"], then.get(name, {}).get("seen")) for name, target in counted.items()
    ]


def _falls(run: RunRecord) -> list[tuple[str, float, float]]:
    """(name, accuracy before, accuracy after) of the objects and styles to keep that lost most, at most three."""
    targets = {normal(target) for target in run.targets}
    pairs = [
        (name, share, _plain(run.stages[run.last], kind).get(name))
        for kind in ("objects", "styles")
        for name, share in _plain(run.stages["before"], kind).items()
        if run.last and normal(name) not in targets
    ]
    lost = [pair for pair in pairs if None not in pair and pair[1] > pair[2]]
    return sorted(lost, key=lambda pair: pair[2] - pair[1])[:3]


def _draw_figures(run: RunRecord) -> dict[str, bytes]:
    """PNGs of the figures for which the run has data."""
    import matplotlib

    with matplotlib.rc_context(fname=STYLE):
        drawn = {
            "loss": draw_loss(run.lines, run.targets),
            "mask": draw_mask(run.lines, run.targets, (run.costs.get("weights") or {}).get("trained")),
            "relapse": draw_relapse(run.accuracies, run.targets),
        }
        buffers = {name: io.BytesIO() for name, figure in drawn.items() if figure is not None}
        for name, buffer in buffers.items():
            drawn[name].savefig(buffer, format="png")
    return {name: buffer.getvalue() for name, buffer in buffers.items()}


def _thumbnail_uri(image: Image, is_tiny: bool) -> str:
    kind = "png" if is_tiny else "jpeg"  # a photograph as PNG is ten times the size
    return _data_uri(_encode(image, kind), kind)


def _encode(image: Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _without_nan(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except ValueError as error:
        raise RunFolderError(
            f"{path} is damaged ({error}): delete it and run the command again that writes it"
        ) from error


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_without_nan(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
