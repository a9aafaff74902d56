"""Metrics, one per file. The file name is the metric's name in `evaluate.metrics`; `base` is the interface.

To add a metric, add a file with a function `build(context, options)` and, for options of its own, a dataclass
`Options`; nothing else changes. `base` says what both must do, and `base.build_metrics` finds them for the evaluator.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.evaluation.metrics.base import Metric, MetricContext, NoOptions, build_metrics

__getattr__, __dir__ = lazy_exports(__name__, {"base": ["Metric", "MetricContext", "NoOptions", "build_metrics"]})
