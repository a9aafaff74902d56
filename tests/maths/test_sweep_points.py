"""Search points: each distribution by hand or by its moments, a grid's values, and the Pareto front."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sculpt_dist.maths.sweep_points import KINDS, Parameter, undominated, value_at


def parameter(kind: str, **options) -> Parameter:
    return Parameter("x", kind, {**KINDS[kind][1], **options})


@pytest.mark.parametrize(
    ("it", "values"),  # at the shares 0, 1/4, 1/2 and 1
    [
        (parameter("constant", value="a"), ["a", "a", "a", "a"]),
        (parameter("categorical", values=["a", "b", "c", "d"]), ["a", "b", "c", "d"]),
        (parameter("categorical_w_probabilities", values=["a", "b"], probabilities=[0.3, 0.7]), ["a", "a", "b", "b"]),
        (parameter("int_uniform", min=1, max=4), [1, 2, 3, 4]),
        (parameter("uniform", min=-1.0, max=3.0), [-1.0, 0.0, 1.0, 3.0]),
        (parameter("q_uniform", min=0.0, max=1.0, q=0.1), [0.0, 0.2, 0.5, 1.0]),
        (parameter("q_uniform", min=0, max=40, q=10), [0, 10, 20, 40]),
        (parameter("log_uniform", min=0.0, max=math.log(16)), [1.0, 2.0, 4.0, 16.0]),
        (parameter("log_uniform_values", min=1.0, max=16.0), [1.0, 2.0, 4.0, 16.0]),
        (parameter("inv_log_uniform", min=0.0, max=math.log(16)), [1 / 16, 1 / 8, 1 / 4, 1.0]),
        (parameter("inv_log_uniform_values", min=1 / 16, max=1.0), [1 / 16, 1 / 8, 1 / 4, 1.0]),
        (parameter("q_log_uniform_values", min=1.0, max=16.0, q=4), [4, 4, 4, 16]),  # 0 is no value between 1 and 16
        (parameter("q_log_uniform", min=0.0, max=math.log(16), q=0.5), [1.0, 2.0, 4.0, 16.0]),
    ],
    ids=lambda it: it.kind if isinstance(it, Parameter) else "",
)
def test_a_share_gives_the_quantile(it, values):
    found = [value_at(it, share) for share in (0.0, 0.25, 0.5, 1.0)]
    assert found == pytest.approx(values) and [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("kind", "step"), [("normal", None), ("q_normal", 0.5), ("log_normal", None), ("q_log_normal", 0.5)]
)
def test_normal_kinds_have_their_mean_and_deviation_and_finite_ends(kind, step):
    it = parameter(kind, mu=2.0, sigma=0.5, **({"q": step} if step else {}))
    drawn = np.array([value_at(it, (i + 0.5) / 4000) for i in range(4000)])
    if step:
        assert np.allclose(drawn / step, np.round(drawn / step))
    natural = np.log(np.maximum(drawn, 0.25)) if "log" in kind else drawn
    assert natural.mean() == pytest.approx(2.0, abs=0.01) and natural.std() == pytest.approx(0.5, abs=0.03)
    assert all(math.isfinite(value_at(it, end)) for end in (0.0, 1.0))


def test_values_are_drawn_with_their_probabilities():
    it = parameter("categorical_w_probabilities", values=["a", "b", "c"], probabilities=[0.5, 0.0, 0.5])
    drawn = [value_at(it, (i + 0.5) / 1000) for i in range(1000)]
    assert drawn.count("a") == 500 and drawn.count("b") == 0


def test_a_grid_uses_categories_integers_and_steps_without_the_last():
    assert parameter("categorical", values=[3, 1]).choices == [3, 1]
    assert parameter("int_uniform", min=2, max=4).choices == [2, 3, 4]
    assert parameter("q_uniform", min=0.0, max=0.4, q=0.1).choices == [0.0, 0.1, 0.2, 0.3]
    assert parameter("uniform", min=0.0, max=1.0).choices is None and parameter("normal").choices is None


def test_a_result_is_undominated_unless_another_is_better_and_not_worse_anywhere():
    assert undominated([(1.0, 0.5), (0.5, 1.0), (0.5, 0.9), (1.0, 0.5), (0.4, 0.4)]) == [True, True, False, True, False]
    assert undominated([]) == []
