"""Writes the tables of a comparison as an HTML page, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sculpt_dist.config.experiments import Comparison
from sculpt_dist.core.files import make_folder, write_atomically
from sculpt_dist.experiments.tables import (
    FinishedCell,
    Line,
    attack_columns,
    extra_names,
    score_names,
    table_lines,
    trade_off,
)
from sculpt_dist.maths.sweep_points import undominated
from sculpt_dist.report.figures import draw_pngs
from sculpt_dist.report.render import render
from sculpt_dist.report.sweep_figures import draw_front


@dataclass(frozen=True)
class Block:
    """One table on one backbone."""

    title: str
    backbone: str
    lines: Sequence[Line]


def write_tables(folder: Path, comparison: Comparison, finished: Mapping[str, FinishedCell]) -> Path:
    """Write compare.{html,md,json} into the folder and return the path of the page. `finished`: cells by their key."""
    blocks = [
        Block(table.title, backbone, table_lines(comparison, table, backbone, finished))
        for table in comparison.tables
        for backbone in table.backbones
    ]
    make_folder(folder)
    plain = [vars(block) | {"lines": [_as_json(line) for line in block.lines]} for block in blocks]
    write_atomically(folder / "compare.json", (json.dumps(plain, indent=1) + "\n").encode())
    write_atomically(folder / "compare.md", as_markdown(comparison, blocks).encode())
    write_atomically(folder / "compare.html", as_page(comparison, blocks).encode())
    return folder / "compare.html"


def as_page(comparison: Comparison, blocks: Sequence[Block]) -> str:
    """The tables as a self-contained page."""
    return render(
        "compare.html",
        {
            "number": _number,
            "extra_names": lambda block: extra_names(block.lines),
            "score_names": lambda block: score_names(block.lines),
            "attack_columns": lambda block: attack_columns(block.lines),
            "attack_text": attack_text,
        },
        comparison=comparison,
        blocks=blocks,
        figures=draw_pngs({str(i): partial(_front, block) for i, block in enumerate(blocks)}),
    )


def _front(block: Block) -> Any:
    """Forgetting against keeping, a point per row; None where fewer than three rows have both."""
    pairs = trade_off(block.lines)
    points = list(pairs.values())
    return draw_front(points, undominated(points), list(pairs)) if len(points) > 2 else None


def as_markdown(comparison: Comparison, blocks: Sequence[Block]) -> str:
    """The tables in GitHub's Markdown, followed by the notes."""
    parts = []
    for block in blocks:
        scores, extra = score_names(block.lines), extra_names(block.lines)
        heads = ["", *scores, "UA of each", "relapse", "FID", "KID", *extra]
        heads += ["passes", "CPU-s", "MB", "trained", "stored MB", "seeds"]
        rows = [heads, ["---"] * len(heads), *(_cells(line, comparison.against, scores, extra) for line in block.lines)]
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        parts.append(f"### {block.title}, {block.backbone}\n\n{table}")
        if names := attack_columns(block.lines):
            parts.append(f"#### Attacks: {block.title}, {block.backbone}\n\n{_attack_table(block.lines, names)}")
    return "\n\n".join([*parts, *comparison.notes]) + "\n"


def _attack_table(lines: Sequence[Line], names: Sequence[str]) -> str:
    """The rate of every attack on every row, with its interval; their mean, and H4."""
    rows = [["", *names, "ASR", "H4", "runs"], ["---"] * (len(names) + 4)]
    for line in lines:
        rates = [attack_text(line, name) for name in names]
        rows.append([line.name, *rates, _number(line.asr, ".3f"), _number(line.h4, ".3f"), str(len(line.seeds))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def attack_text(line: Line, name: str) -> str:
    """Rate [interval] of an attack on a row."""
    rate, interval = line.attacks.get(name, (None, None))
    if rate is None:
        return "-"
    return f"{rate:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _cells(line: Line, against: str, scores: Sequence[str], extra: Sequence[str]) -> list[str]:
    label = line.name + (f" ({line.note})" if line.note else "")
    return [
        f"**{label}**" if line.name == against else label,
        *(_score_text(line, name) for name in scores),
        ", ".join(f"{name} {_number(value, '.3f')}" for name, value in line.targets.items()),
        _number(line.relapse, "+.3f"),
        _number(line.fid, ".2f"),
        _number(line.kid, ".4f"),
        *(_number(line.extra.get(name), ".4g") for name in extra),
        f"{line.passes:,.0f}",
        f"{line.cpu_seconds:.1f}",
        f"{line.peak_memory:.0f}",
        f"{line.trained:,}",
        f"{line.stored:.2f}",
        str(len(line.seeds)),
    ]


def _score_text(line: Line, name: str) -> str:
    """Mean [interval] (difference), with a star if the interval of the difference excludes 0."""
    score = line.scores.get(name)
    if score is None:
        return "-"
    text = f"{score.mean:.3f}" + (f" [{score.interval[0]:.3f}, {score.interval[1]:.3f}]" if score.interval else "")
    if score.difference is not None and score.difference_interval is not None:
        low, high = score.difference_interval
        text += f" ({score.difference:+.3f}{'*' if low > 0 or high < 0 else ''})"
    return text


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _as_json(line: Line) -> dict[str, Any]:
    content = {name: getattr(line, name) for name in line.__dataclass_fields__ if name != "images"}
    return content | {"scores": {name: vars(score) for name, score in line.scores.items()}}
