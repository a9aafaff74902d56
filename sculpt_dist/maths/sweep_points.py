"""Points of a hyperparameter search: distributions under the names of W&B's sweep schema, and Pareto-optimal results.

A value is the inverse cumulative distribution function at a share in [0, 1], so a search draws shares for any
distribution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

RANGE = frozenset({"min", "max"})
NORMAL: frozenset[str] = frozenset()
# kind -> (required options, optional ones with their defaults)
KINDS: dict[str, tuple[frozenset[str], Mapping[str, float]]] = {
    "constant": (frozenset({"value"}), {}),
    "categorical": (frozenset({"values"}), {}),
    "categorical_w_probabilities": (frozenset({"values", "probabilities"}), {}),
    "int_uniform": (RANGE, {}),
    "uniform": (RANGE, {}),
    "q_uniform": (RANGE, {"q": 1}),
    "log_uniform": (RANGE, {}),  # min and max are natural logarithms of the value; for *_values, values
    "log_uniform_values": (RANGE, {}),
    "q_log_uniform": (RANGE, {"q": 1}),
    "q_log_uniform_values": (RANGE, {"q": 1}),
    "inv_log_uniform": (RANGE, {}),  # min and max are natural logarithms of 1 / value
    "inv_log_uniform_values": (RANGE, {}),
    "normal": (NORMAL, {"mu": 0.0, "sigma": 1.0}),
    "q_normal": (NORMAL, {"mu": 0.0, "sigma": 1.0, "q": 1}),
    "log_normal": (NORMAL, {"mu": 0.0, "sigma": 1.0}),
    "q_log_normal": (NORMAL, {"mu": 0.0, "sigma": 1.0, "q": 1}),
}
TAIL = 1e-9  # probability that is cut off at either end of a normal distribution


@dataclass(frozen=True)
class Parameter:
    """A parameter of a search; `options` has every required and optional option of its kind."""

    name: str
    kind: str
    options: Mapping[str, Any]

    @property
    def choices(self) -> list[Any] | None:
        """All values, in order, of a kind that a grid can use, else None. A range with q excludes max, as in W&B."""
        given = self.options
        if self.kind == "constant":
            return [given["value"]]
        if self.kind == "categorical":
            return list(given["values"])
        if self.kind == "int_uniform":
            return list(range(given["min"], given["max"] + 1))
        if self.kind == "q_uniform":
            return [_plain(value, given["q"]) for value in np.arange(given["min"], given["max"], given["q"])]
        return None

    @property
    def is_logarithmic(self) -> bool:
        return "log" in self.kind


def value_at(parameter: Parameter, share: float) -> Any:
    """The quantile of the parameter's distribution at `share`."""
    kind, given = parameter.kind, parameter.options
    if kind == "constant":
        return given["value"]
    if kind.startswith("categorical"):
        values = given["values"]
        edges = np.cumsum(given.get("probabilities", [1.0] * len(values)))
        return values[min(int(np.searchsorted(edges, share * edges[-1], side="right")), len(values) - 1)]
    if kind == "int_uniform":
        return min(given["min"] + int(share * (given["max"] - given["min"] + 1)), given["max"])
    smooth = _smooth(kind.removeprefix("q_"), given, share)
    return _quantised(smooth, kind, given) if kind.startswith("q_") else smooth


def _smooth(kind: str, given: Mapping[str, float], share: float) -> float:
    """The value before rounding to a multiple of q."""
    if kind.endswith("normal"):
        deviate = given["mu"] + given["sigma"] * NormalDist().inv_cdf(min(max(share, TAIL), 1 - TAIL))
        return math.exp(deviate) if kind == "log_normal" else deviate
    low, high = given["min"], given["max"]
    if kind == "uniform":
        return low + share * (high - low)
    if kind == "inv_log_uniform":
        low, high = -high, -low
    elif kind.endswith("_values"):
        low, high = math.log(low), math.log(high)
    return math.exp(low + share * (high - low))


def _quantised(value: float, kind: str, given: Mapping[str, Any]) -> float | int:
    """The nearest multiple of q, within the range if the kind has one."""
    step, multiple = given["q"], round(value / given["q"])
    if "min" in given:
        low, high = (math.exp(given[end]) if kind == "q_log_uniform" else given[end] for end in ("min", "max"))
        multiple = max(min(multiple, math.floor(high / step + TAIL)), math.ceil(low / step - TAIL))
    return _plain(multiple * step, step)


def _plain(value: float, step: float) -> float | int:
    """The value without floating-point noise; an integer when the step is one."""
    return round(value) if isinstance(step, int) else float(f"{value:.12g}")


def undominated(results: Sequence[tuple[float, float]]) -> list[bool]:
    """Which results are on the Pareto front: no other result is better in one score and at least as good in the other.

    Higher is better in both scores.
    """

    def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a != b and a[0] >= b[0] and a[1] >= b[1]

    return [not any(dominates(other, result) for other in results) for result in results]
