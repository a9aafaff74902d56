"""What the figures of a report show."""

from __future__ import annotations

from typing import Any

from sculpt_dist.report.figures import draw_relapse, draw_scores


def curves(points: list[tuple[int, dict[str, Any]]]) -> dict[str, list[tuple[float, float]]]:
    figure = draw_scores(points)
    assert figure is not None
    return {str(line.get_label()): list(zip(line.get_xdata(), line.get_ydata())) for line in figure.axes[0].lines}


def test_the_scores_are_drawn_over_the_number_of_concepts_where_they_were_measured():
    points = [(n, {"UA": 1 - n / 100, "CRA": 0.9 if n != 2 else None, "UA_ci95": [0.5, 1.0]}) for n in (0, 1, 2, 10)]
    assert curves(points) == {
        "UA": [(0, 1.0), (1, 0.99), (2, 0.98), (10, 0.9)],
        "CRA": [(0, 0.9), (1, 0.9), (10, 0.9)],
    }


def test_near_and_far_replace_ira_only_where_both_have_a_curve():
    whole = [(n, {"IRA": 0.9, "IRA_near": 0.8, "IRA_far": 0.95}) for n in range(4)]
    assert set(curves(whole)) == {"IRA near", "IRA far"}
    partly = [(n, {"IRA": 0.9, "IRA_near": 0.8 if n in (1, 2) else None, "IRA_far": 0.95}) for n in range(4)]
    assert set(curves(partly)) == {"IRA", "IRA far"}


def test_concepts_are_counted_in_whole_numbers():
    figure = draw_scores([(n, {"UA": 0.5}) for n in range(4)])
    assert figure is not None
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())


def test_two_stages_have_no_curve():
    assert draw_scores([(0, {"UA": 0.0}), (1, {"UA": 1.0})]) is None


def test_the_heat_map_has_a_row_for_each_measured_stage_and_names_that_do_not_overlap():
    targets = [f"thing {i}" for i in range(100)]
    rows = [[0.9] * 100 if row in (0, 1, 50, 100) else [None] * 100 for row in range(101)]
    figure = draw_relapse(rows, targets)
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "base",
        "after thing 0",
        "after thing 49",
        "after thing 99",
    ]
    assert len(axes.get_xticks()) <= 40
