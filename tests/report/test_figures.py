"""The curves of a report."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from handmade_run import metric_lines

from sculpt_dist.report.figures import draw_loss, draw_mask


def test_curves_survive_a_nan_loss_and_a_term_that_starts_at_zero(tmp_path: Path) -> None:
    lines = metric_lines()
    lines[10]["terms"]["distill"] = 0.0
    lines[12]["loss"] = lines[12]["terms"]["forget"] = math.nan
    lines[13]["terms"]["forget"] = math.inf
    axes = draw_loss(lines, ["cat", "car"]).axes[0]
    assert axes.get_yscale() == "log"
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        "collecting saliency",
        "forget",
        "retain",
        "distill",
    }
    lines[20]["terms"]["forget"] = -1.0
    assert draw_loss(lines, ["cat", "car"]).axes[0].get_yscale() == "linear"


def test_the_open_share_refers_to_the_trained_weights_and_a_method_without_mask_has_no_mask_figure() -> None:
    top = draw_mask(metric_lines(), ["cat", "car"], 122880).axes[0]
    drawn = np.concatenate([line.get_ydata() for line in top.get_lines() if len(line.get_ydata()) > 2])
    assert set(drawn[np.isfinite(drawn)]) == {0.5}, "with a gap between the concepts"
    bare = [
        {name: value for name, value in line.items() if name not in ("open", "swapped", "overlap")}
        for line in metric_lines()
    ]
    assert draw_mask(bare, ["cat", "car"], 122880) is None


def test_a_curve_of_many_short_concepts_shows_the_mean_of_each() -> None:
    lines = [
        {
            "concept": concept,
            "step": step,
            "phase": "collect" if step == 0 else "train",
            "loss": concept + step,
            "open": 7,
        }
        for concept in range(300)
        for step in range(3)
    ]
    axes = draw_loss(lines, ["thing"] * 300).axes[0]
    collected, trained = (line.get_ydata() for line in axes.get_lines() if len(line.get_ydata()) == 300)
    assert list(collected) == list(range(300)) and list(trained) == [concept + 1.5 for concept in range(300)]
    assert len(axes.texts) == 20 and len(axes.patches) == 0, "some are named, and none shaded"
    (opened,) = [
        line for line in draw_mask(lines, ["thing"] * 300, None).axes[0].get_lines() if len(line.get_ydata()) > 2
    ]
    assert len(opened.get_ydata()) == 900 and set(opened.get_ydata()) == {7.0}
