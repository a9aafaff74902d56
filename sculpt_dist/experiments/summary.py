"""The summary of a sweep: its trials sorted by the metric, the metric against each parameter, and UA against what was kept."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

from sculpt_dist.core.files import write_atomically
from sculpt_dist.experiments.ledger import DONE, Outcome, retention
from sculpt_dist.experiments.tables import SCORES, TEMPLATES
from sculpt_dist.experiments.trials import Sweep
from sculpt_dist.maths.points import undominated
from sculpt_dist.report.figures import STYLE, draw_front, draw_parameters


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
    write_atomically(sweep.folder / "sweep.html", _as_page(sweep, head, rows, _draw_figures(sweep, rows)).encode())


def summary_rows(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The best trial first; then those without the metric, those that failed, and those that are open."""
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
    pairs = {index: pair for index, pair in both.items() if None not in pair}
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
    """The table as GitHub reads it."""
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
    goal = f"Sorted by {sweep.settings.metric.name} ({sweep.settings.metric.goal}). kept: the harmonic mean of IRA and CRA; "
    goal += "front: no other trial is better in UA or kept without being worse in the other."
    return (
        f"### {sweep.name}\n\n{goal}\n\n"
        + "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)
        + "\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _draw_figures(sweep: Sweep, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """PNGs, by name, as base64, of what is done."""
    import matplotlib

    name = sweep.settings.metric.name
    scored = [row for row in rows if row["scores"][name] is not None]
    searched = [parameter for parameter in sweep.parameters if len(parameter.choices or (0, 1)) > 1]
    pairs = [row for row in rows if row["kept"] is not None and row["scores"]["UA"] is not None]
    figures = {}
    with matplotlib.rc_context(fname=STYLE):
        if scored and searched:
            points = {parameter.name: [row["point"][parameter.name] for row in scored] for parameter in searched}
            logarithmic = [
                parameter.name for parameter in searched if parameter.is_logarithmic or _is_wide(points[parameter.name])
            ]
            figures["parameters"] = draw_parameters(
                points, logarithmic, [row["scores"][name] for row in scored], name, best=0
            )
        if pairs:
            places = [(row["scores"]["UA"], row["kept"]) for row in pairs]
            figures["front"] = draw_front(places, [row["front"] for row in pairs], [str(row["trial"]) for row in pairs])
        drawn = {}
        for key, figure in figures.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            drawn[key] = base64.b64encode(buffer.getvalue()).decode()
    return drawn


def _is_wide(values: Sequence[Any]) -> bool:
    """Whether numbers span so much that they are read better on a logarithmic scale."""
    numbers = [value for value in values if isinstance(value, (int, float))]
    return len(numbers) == len(values) and min(numbers) > 0 and max(numbers) / min(numbers) > 8


def _as_page(sweep: Sweep, head: dict[str, Any], rows: Sequence[dict[str, Any]], figures: dict[str, str]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    names = [parameter.name for parameter in sweep.parameters]
    return environment.get_template("sweep.html").render(
        head=head, rows=rows, names=names, scores=SCORES, figures=figures
    )
