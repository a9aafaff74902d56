"""The summary of a sweep: trials sorted by the metric, the metric against each parameter, and UA against retention."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sculpt_dist.core.files import write_atomically
from sculpt_dist.experiments.ledger import DONE, Outcome, retention
from sculpt_dist.experiments.tables import SCORES
from sculpt_dist.experiments.trials import Sweep
from sculpt_dist.maths.sweep_points import undominated
from sculpt_dist.report.figures import draw_pngs
from sculpt_dist.report.render import render
from sculpt_dist.report.sweep_figures import draw_front, draw_parameters


def write_summary(sweep: Sweep, outcomes: Sequence[Outcome]) -> None:
    """Write sweep.{json,md,html} into the sweep's folder."""
    rows = summary_rows(sweep, outcomes)
    metric = sweep.settings.metric
    head = {
        "name": sweep.name,
        "method": sweep.settings.method,
        "metric": metric.name,
        "goal": metric.goal,
        "trials": sweep.count,
    }
    write_atomically(
        sweep.folder / "sweep.json", (json.dumps(head | {"rows": rows}, indent=1, default=str) + "\n").encode()
    )
    write_atomically(sweep.folder / "sweep.md", as_markdown(sweep, rows).encode())
    names = [parameter.name for parameter in sweep.parameters]
    page = render("sweep.html", head=head, rows=rows, names=names, scores=SCORES, figures=_draw_figures(sweep, rows))
    write_atomically(sweep.folder / "sweep.html", page.encode())


def summary_rows(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Best trial first, then trials without the metric, failed trials and open trials."""
    metric = sweep.settings.metric
    sign = -1.0 if metric.goal == "maximize" else 1.0

    def place(ended: Outcome) -> tuple[Any, ...]:
        value = ended.scores.get(metric.name)
        return (
            value is None,
            ended.state != DONE,
            ended.state,
            sign * value if value is not None else 0.0,
            ended.trial.index,
        )

    ordered = sorted(outcomes, key=place)
    both = {
        ended.trial.index: (ended.scores["UA"], retention(ended.scores)) for ended in ordered if ended.state == DONE
    }
    pairs = {index: (ua, kept) for index, (ua, kept) in both.items() if ua is not None and kept is not None}
    front = dict(zip(pairs, undominated(list(pairs.values()))))
    return [
        {
            "trial": ended.trial.index,
            "point": dict(ended.trial.point),
            "state": ended.state,
            "scores": {name: ended.scores.get(name) for name in SCORES},
            "kept": both.get(ended.trial.index, (None, None))[1],
            "front": front.get(ended.trial.index, False),
            "reason": ended.reason,
            "folder": str(ended.trial.folder),
        }
        for ended in ordered
    ]


def as_markdown(sweep: Sweep, rows: Sequence[dict[str, Any]]) -> str:
    """The table in GitHub's Markdown."""
    names = [parameter.name for parameter in sweep.parameters]
    heads = [
        "trial",
        *names,
        *(f"**{name}**" if name == sweep.settings.metric.name else name for name in SCORES),
        "kept",
        "front",
        "",
    ]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        scores = [_number(row["scores"][name]) for name in SCORES]
        cells = [
            str(row["trial"]),
            *(str(row["point"][name]) for name in names),
            *scores,
            _number(row["kept"]),
            "yes" if row["front"] else "",
        ]
        lines.append([*cells, "" if row["state"] == DONE else f"{row['state']} {row['reason']}".strip()])
    metric = sweep.settings.metric
    note = (
        f"Sorted by {metric.name} ({metric.goal}). kept: the harmonic mean of IRA and CRA; "
        "front: no other trial is better in UA or kept without being worse in the other."
    )
    return (
        f"### {sweep.name}\n\n{note}\n\n"
        + "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)
        + "\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _draw_figures(sweep: Sweep, rows: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """PNGs by name, of the finished trials."""
    metric = sweep.settings.metric.name
    scored = [row for row in rows if row["scores"][metric] is not None]
    searched = [parameter for parameter in sweep.parameters if len(parameter.choices or (0, 1)) > 1]
    pairs = [row for row in rows if row["kept"] is not None and row["scores"]["UA"] is not None]
    drawings: dict[str, Callable[[], Any]] = {}
    if scored and searched:
        points = {parameter.name: [row["point"][parameter.name] for row in scored] for parameter in searched}
        logarithmic = [
            parameter.name for parameter in searched if parameter.is_logarithmic or _is_wide(points[parameter.name])
        ]
        scores = [row["scores"][metric] for row in scored]
        drawings["parameters"] = partial(draw_parameters, points, logarithmic, scores, metric, best=0)
    if pairs:
        places = [(row["scores"]["UA"], row["kept"]) for row in pairs]
        trials = [str(row["trial"]) for row in pairs]
        drawings["front"] = partial(draw_front, places, [row["front"] for row in pairs], trials)
    return draw_pngs(drawings)


def _is_wide(values: Sequence[Any]) -> bool:
    """Whether the numbers span so much that a logarithmic scale reads better."""
    numbers = [value for value in values if isinstance(value, (int, float))]
    return len(numbers) == len(values) and min(numbers) > 0 and max(numbers) / min(numbers) > 8
