"""The figures of a run's report: its curves and the heat map of relapse."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = Mapping[str, Any]  # one step, a line of metrics.jsonl

STYLE = Path(__file__).parent / "templates" / "figures.mplstyle"
INK, MUTED, HAIR, ACCENT = "#1d1f23", "#70747c", "#b9b6ae", "#c4512d"  # as in page.css
WIDTH = 10.4  # inches
MOST_NAMED, SOME = 100, 20  # concepts that a figure marks and names; of more, about so many
COLLECTING = "collecting saliency"  # the curve of the steps before a mask exists


def draw_pngs(drawings: Mapping[str, Callable[[], Figure | None]]) -> dict[str, bytes]:
    """Draw each figure in the style of the reports, as a PNG; a drawing that returns None is left out."""
    import matplotlib

    images = {}
    with matplotlib.rc_context(fname=STYLE):
        for name, draw in drawings.items():
            figure = draw()
            if figure is not None:
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png")
                images[name] = buffer.getvalue()
    return images


def draw_loss(lines: Sequence[Line], targets: Sequence[str]) -> Figure | None:
    """The loss terms over the steps: raw values and their running means, or of many concepts the mean of each.

    None without steps. The scale is logarithmic unless a term is negative.
    """
    import numpy as np
    from matplotlib.figure import Figure

    def terms_of(line: Line) -> Mapping[str, float | None]:
        if line.get("phase") == "collect":
            return {COLLECTING: line.get("loss")}
        return line.get("terms") or {"loss": line.get("loss")}

    names = list(dict.fromkeys(name for line in lines for name in terms_of(line)))
    curves = {name: _values([terms_of(line).get(name) for line in lines]) for name in names}
    curves = {name: values for name, values in curves.items() if np.isfinite(values).any()}
    if not curves:
        return None
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.subplots()
    colors = {name: f"C{at}" for at, name in enumerate(name for name in curves if name != COLLECTING)}
    colors[COLLECTING] = MUTED
    is_long = len(_spans(lines)) > MOST_NAMED
    for name, values in curves.items():
        if is_long:
            axes.plot(*_concept_means(values, lines), color=colors[name], label=name)
        else:
            axes.plot(values, color=colors[name], alpha=0.25, linewidth=0.7)
            axes.plot(_running_mean(values, lines), color=colors[name], label=name)
    every = np.stack(list(curves.values()))
    if np.nanmin(every) >= 0 and np.nanmax(every) > 0:  # 0 is allowed: distillation starts there
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], np.nanmax(every) * 1e-5))
    axes.set_ylabel("weighted loss")
    _mark_concepts(axes, lines, targets, names_too=True)
    axes.set_xlabel("step of the run")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_mask(lines: Sequence[Line], targets: Sequence[str], num_trained: int | None) -> Figure | None:
    """Open weights, weights swapped per refresh, and overlap, a panel each. None if the method has no mask."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    concept = _values([line["concept"] for line in lines])
    opened, swapped, overlap = (_values([line.get(key) for line in lines]) for key in ("open", "swapped", "overlap"))
    panels = []
    if np.isfinite(opened).any():
        panels.append(
            ("open weights, share of the trained weights", opened / num_trained, True)
            if num_trained
            else ("open weights", opened, False)
        )
    if np.isfinite(swapped).any():
        panels.append(("weights swapped at each refresh", swapped, False))
    if np.isfinite(overlap).any():
        panels.append(("overlap: share of the open weights that were open before the last refresh", overlap, True))
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, 0.6 + 1.45 * len(panels)))
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for at, (axes, (title, values, is_share)) in enumerate(zip(rows, panels)):
        seen = np.flatnonzero(np.isfinite(values))
        if values is swapped:
            axes.vlines(seen, 0, values[seen], color=f"C{at}", linewidth=1.2)
            axes.plot(seen, values[seen], "o", color=f"C{at}", markersize=3.5)
        else:  # a line that breaks between concepts unless they are many, with markers if there are few points
            breaks = np.flatnonzero(np.diff(concept[seen])) + 1
            breaks = breaks if len(breaks) < MOST_NAMED else breaks[:0]
            places, heights = (np.insert(along, breaks, np.nan) for along in (seen.astype(float), values[seen]))
            axes.plot(places, heights, "o-" if len(seen) < len(lines) / 4 else "-", color=f"C{at}", markersize=3.5)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0) if is_share else EngFormatter(sep=""))
        axes.set_ylim(0, 1.08 if is_share else 1.15 * max(values[seen].max(), 1))
        axes.set_title(title, pad=16 if at == 0 else 6)
        _mark_concepts(axes, lines, targets, names_too=at == 0)
    rows[-1].set_xlabel("step of the run")
    return figure


def draw_scores(points: Sequence[tuple[int, Mapping[str, Any]]]) -> Figure | None:
    """Scores with their 95 % intervals over the number of concepts forgotten, from (number, scores).

    None where fewer than three stages were scored: a table says as much.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = ("UA", "IRA_near", "IRA_far", "IRA_held", "IRA", "CRA")
    curves = {name: [(n, scores) for n, scores in points if scores.get(name) is not None] for name in names}
    curves = {name: scored for name, scored in curves.items() if len(scored) > 2}
    if not curves:
        return None
    if "IRA_near" in curves and "IRA_far" in curves:
        curves.pop("IRA", None)  # the two others tell more
    figure = Figure(figsize=(WIDTH, 3.2))
    axes = figure.subplots()
    for name, scored in curves.items():
        at, values = [n for n, _ in scored], [scores[name] for _, scores in scored]
        (line,) = axes.plot(at, values, marker=".", label=name.replace("_", " "))
        bounds = [scores.get(f"{name}_ci95") or (np.nan, np.nan) for _, scores in scored]
        low, high = zip(*bounds)
        axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("concepts forgotten")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_relapse(rows: Sequence[Sequence[float | None]], targets: Sequence[str]) -> Figure | None:
    """Accuracy of each target (column) in the base model (first row) and after each step.

    `rows`: [1 + num_targets, num_targets]. Returns None if no accuracy was measured.
    """
    import numpy as np

    values = np.stack([_values(row) for row in rows])  # [1 + num_targets, num_targets]
    if not np.isfinite(values).any():
        return None
    measured = np.flatnonzero(np.isfinite(values).any(1))
    forgotten = measured[:, None] > np.arange(len(targets))[None, :]  # by this row
    labels = ["base", *(f"after {shorten(name, 16)}" for name in targets)]
    return _heat_map(values[measured], forgotten, targets, [labels[row] for row in measured])


def draw_hurt(stages: Sequence[str], names: Sequence[str], rows: Sequence[Sequence[float | None]]) -> Figure | None:
    """What each name (column) lost of its accuracy at each stage (row), [num_stages, num_names]; None without names."""
    import numpy as np

    if not names:
        return None
    losses = np.stack([_values(row) for row in rows])
    return _heat_map(losses, np.ones(losses.shape, bool), names, stages, room=12)


def _heat_map(
    values: np.ndarray, is_marked: np.ndarray, columns: Sequence[str], rows: Sequence[str], room: int = 0
) -> Figure:
    """Shares in [0, 1] as tinted cells, [num_rows, num_columns]: the marked ones orange, the others grey.

    `room`: the figure is at least as wide as for so many columns.
    """
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    height, num = values.shape
    room = max(room, num)
    figure = Figure(figsize=(min(2.2 + 0.95 * room, WIDTH), min(1.0 + 0.46 * height, 9)))
    axes = figure.subplots()
    for part, color in ((is_marked, ACCENT), (~is_marked, "#7b838e")):
        tint = LinearSegmentedColormap.from_list("tint", ["#faf8f4", color])
        axes.imshow(np.where(part, values, np.nan), cmap=tint, vmin=0, vmax=1, aspect="auto")
    axes.set_xlim(-0.5, room - 0.5)
    names = [shorten(name, 16) for name in columns]
    every = max(_interval(num), -(-num // 40))  # more names would overlap
    rotation, alignment = (0, "center") if num <= 6 else (35, "left")
    axes.set_xticks(range(0, num, every), names[::every], rotation=rotation, ha=alignment)
    rows_named = _interval(height)
    axes.set_yticks(range(0, height, rows_named), list(rows)[::rows_named])
    axes.tick_params(length=0, labelcolor=INK, labelsize=9, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if every == 1:
        axes.set_xticks(np.arange(num + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(height + 1) - 0.5, minor=True)
        axes.grid(True, which="minor", axis="both", color="white", linewidth=2)
    if num <= 12 and height <= 25:
        for place, value in np.ndenumerate(values):
            text, color = ("-", MUTED) if np.isnan(value) else (f"{100 * value:.0f}", "white" if value > 0.55 else INK)
            weight = "bold" if is_marked[place] else "normal"
            axes.text(place[1], place[0], text, ha="center", va="center", color=color, fontweight=weight)
    return figure


def shorten(name: str, most: int) -> str:
    """The name in at most `most` characters; two dots replace what is cut off."""
    return name if len(name) <= most else name[: max(most - 2, 1)] + ".."


def _values(members: Sequence[float | None]) -> np.ndarray:
    """The values as an array [num_lines], NaN for missing and non-finite ones."""
    import numpy as np

    values = np.array([np.nan if member is None else member for member in members], dtype=float)
    return np.where(np.isfinite(values), values, np.nan)


def _running_mean(values: np.ndarray, lines: Sequence[Line]) -> np.ndarray:
    """A centred mean over a twelfth of a concept's steps, within each concept; NaN stays NaN."""
    import numpy as np

    smooth = np.full_like(values, np.nan)
    for start, stop, _ in _spans(lines):
        here = values[start:stop]
        seen = np.isfinite(here)
        kernel = np.ones(min(max(1, (stop - start) // 12), stop - start))
        total, count = np.convolve(np.where(seen, here, 0), kernel, "same"), np.convolve(seen, kernel, "same")
        smooth[start:stop] = np.where(seen, total / np.maximum(count, 1), np.nan)
    return smooth


def _concept_means(values: np.ndarray, lines: Sequence[Line]) -> tuple[list[float], list[float]]:
    """The middle of each concept with such values, and their mean."""
    import numpy as np

    spans = [(start, stop) for start, stop, _ in _spans(lines) if np.isfinite(values[start:stop]).any()]
    middles = [(start + stop - 1) / 2 for start, stop in spans]
    return middles, [float(np.nanmean(values[start:stop])) for start, stop in spans]


def _interval(num: int) -> int:
    """Of so many concepts, every how many a figure marks."""
    return 1 if num <= MOST_NAMED else -(-num // SOME)


def _spans(lines: Sequence[Line]) -> list[tuple[int, int, int]]:
    """(first line, one past the last, concept) of every concept with steps."""
    starts = [at for at, line in enumerate(lines) if at == 0 or line["concept"] != lines[at - 1]["concept"]]
    return [(start, stop, lines[start]["concept"]) for start, stop in zip(starts, [*starts[1:], len(lines)])]


def _mark_concepts(axes: Axes, lines: Sequence[Line], targets: Sequence[str], names_too: bool) -> None:
    """Separate concepts by hairlines, shade the steps that collect saliency, and write the concepts' names on top.

    Of many concepts only some are marked, and nothing is shaded.
    """
    axes.set_xlim(-0.01 * len(lines), 1.01 * len(lines))
    spans = _spans(lines)
    every = _interval(len(spans))
    for start, stop, concept in spans[::every]:
        if every == 1:
            num_collect = sum(line.get("phase") == "collect" for line in lines[start:stop])
            axes.axvspan(start - 0.5, start + num_collect - 0.5, color="#f3f1ec", zorder=-1, linewidth=0)
        if start:
            axes.axvline(start - 0.5, color=HAIR, linewidth=0.9)
        if names_too:
            num_fitting = int(100 * every * (stop - start) / len(lines))
            name = shorten(targets[concept] if concept < len(targets) else str(concept), max(num_fitting, 3))
            axes.text(
                start, 1.02, name, transform=axes.get_xaxis_transform(), color=INK, fontweight="bold", fontsize=8.5
            )
