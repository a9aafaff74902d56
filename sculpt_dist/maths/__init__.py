"""Formulas: tensors or numbers in, tensors or numbers out. No device, rank, configuration or file.

Noise and its targets in `diffusion`, loss terms in `losses`, mask statistics in `saliency`, schedules of rates and
turnover in `schedules`; scores in `accuracy` and their intervals over seeds in `comparison`; a run's memory and
traffic in `planning`; searches in `sweep_points`; linear algebra in `closed_form`, `low_rank`, `distances`; bfloat16 in
`rounding`. Everybody may import this; of the project it imports only `core.exports`.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.maths.accuracy import Answers, Counts, Target, bootstrap_intervals, unlearning_scores
    from sculpt_dist.maths.closed_form import EditSystem
    from sculpt_dist.maths.comparison import HARMONIC, harmonic, percentiles, resampled_scores, score_means
    from sculpt_dist.maths.diffusion import ddpm_corrupt, ddpm_velocity, flow_corrupt, flow_velocity, shifted_sigma
    from sculpt_dist.maths.distances import farthest_points
    from sculpt_dist.maths.losses import guided_label, mse, negative_guidance
    from sculpt_dist.maths.low_rank import low_rank_factors
    from sculpt_dist.maths.rounding import round_to_bf16
    from sculpt_dist.maths.saliency import accumulate, sort_keys
    from sculpt_dist.maths.schedules import learning_rate_factor, turnover_count, turnover_share
    from sculpt_dist.maths.sweep_points import Parameter, undominated, value_at

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "closed_form": ["EditSystem"],
        "comparison": ["HARMONIC", "harmonic", "percentiles", "resampled_scores", "score_means"],
        "diffusion": ["ddpm_corrupt", "ddpm_velocity", "flow_corrupt", "flow_velocity", "shifted_sigma"],
        "distances": ["farthest_points"],
        "losses": ["guided_label", "mse", "negative_guidance"],
        "low_rank": ["low_rank_factors"],
        "rounding": ["round_to_bf16"],
        "sweep_points": ["Parameter", "undominated", "value_at"],
        "saliency": ["accumulate", "sort_keys"],
        "schedules": ["learning_rate_factor", "turnover_count", "turnover_share"],
        "accuracy": ["Answers", "Counts", "Target", "bootstrap_intervals", "unlearning_scores"],
    },
)
