"""Scores a model: which images to draw, what a classifier sees in them, and how they measure up.

`requests` resolves the settings into an `Evaluation`, `evaluator` draws and judges its images on all ranks, `scoring`
computes UA, SA, IRA and CRA. `metrics/` and `classifiers/` hold one metric and one kind of classifier per file;
`features` and `model_folders` are what those share. `run` and `experiments` import this package.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.evaluation.evaluator import check_evaluation, check_prompts, evaluate
    from sculpt_dist.evaluation.requests import EvaluatedWorld, Evaluation, ImageRequest, resolve_evaluation
    from sculpt_dist.evaluation.scoring import score_targets

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "evaluator": ["check_evaluation", "check_prompts", "evaluate"],
        "requests": ["Evaluation", "ImageRequest", "EvaluatedWorld", "resolve_evaluation"],
        "scoring": ["score_targets"],
    },
)
