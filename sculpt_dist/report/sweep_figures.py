"""The scatter plots of sweeps and comparisons: scores over parameters, and forgetting against what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sculpt_dist.report.figures import ACCENT, INK, MUTED, WIDTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_parameters(
    points: Mapping[str, Sequence[Any]], logarithmic: Sequence[str], scores: Sequence[float], score: str, best: int
) -> Figure:
    """The score of every trial against each of its parameters, a panel each, with the best trial highlighted.

    Booleans and texts are drawn as categories.
    """
    from matplotlib.figure import Figure

    columns = min(len(points), 3)
    rows = -(-len(points) // columns)
    figure = Figure(figsize=(WIDTH, 0.4 + 2.9 * rows))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes, (name, values) in zip(panels, points.items()):
        numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        places = list(values) if numeric else [str(value) for value in values]
        axes.plot(places, scores, "o", color=MUTED, alpha=0.7)
        axes.plot([places[best]], [scores[best]], "o", color=ACCENT, markersize=8)
        if numeric and name in logarithmic and min(values) > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        if numeric and len(set(values)) <= 6:
            axes.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
            axes.minorticks_off()
        axes.set_xlabel(name)
    for axes in panels[len(points) :]:
        axes.set_visible(False)
    for row in range(rows):
        panels[row * columns].set_ylabel(score)
    return figure


def draw_front(pairs: Sequence[tuple[float, float]], front: Sequence[bool], labels: Sequence[str]) -> Figure:
    """UA against retention, both in [0, 1], a point per trial or method; the Pareto front is connected and labelled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * 0.55, 4.4))
    axes = figure.subplots()
    axes.plot([ua for ua, _ in pairs], [kept for _, kept in pairs], "o", color=MUTED, alpha=0.7)
    best = sorted((pair, label) for pair, label, is_best in zip(pairs, labels, front) if is_best)
    axes.plot([pair[0] for pair, _ in best], [pair[1] for pair, _ in best], "o-", color=ACCENT, drawstyle="steps-pre")
    for pair, label in best:
        axes.annotate(label, pair, textcoords="offset points", xytext=(5, 5), color=INK, fontsize=8.5)
    axes.set_xlabel("UA (forgetting)")
    axes.set_ylabel("kept (harmonic mean of IRA and CRA)")
    return figure
