"""Negative preference optimisation: gradient ascent that stops by itself (Zhang et al., arXiv 2404.05868, eq. 4).

The paper forgets with a language model. A reconstruction for diffusion: a sample's log-likelihood is replaced by its
negative denoising loss, as Diffusion-DPO does (Wallace et al., arXiv 2311.12908, eq. 14). Let l(x, c) be the denoising
loss of a sample under the student, l0 under the model before this concept, x_f samples of the target and x_s of the
superclass:

    L = -(2 / b) mean log sigmoid(b (l(x_f, c_f) - l0(x_f, c_f))) + r MSE(e(x_s, c_s), goal_s)

For b -> 0 the first term's gradient is that of `ascent`; it fades for samples that have become much worse than before.
A denoising loss is a mean over elements, so that b is about 100, where language models take 0.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import Losses
from sculpt_dist.maths.losses import mse, mse_each
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.base import Step, matrices


@dataclass(frozen=True)
class Config:
    """The options of npo."""

    name: str = "npo"
    """Name of this method."""
    beta: float = 100.0
    """How soon the term fades, b."""
    retain_weight: float = 1.0
    """Weight of denoising the superclass, r."""
    trains: str = "cross_attention"
    """Group of parameters that trains."""


class Method(Base):
    """Trains one group's matrices."""

    def __init__(self, config: Config) -> None:
        if config.beta <= 0:
            raise ConfigError(f"method.beta={config.beta}: must be greater than 0")
        self.config = config

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        return matrices(groups, self.config.trains)

    def saliency(self, step: Step) -> Losses:
        return self.losses(step)

    def losses(self, step: Step) -> Losses:
        target, superclass = step.batch.target, step.batch.superclass
        time = step.backbone.sample_time(step.rng.uniform("time"))  # [B], the same for both
        noisy, goal = step.corrupted(target, time, "target")
        retained, retained_goal = step.corrupted(superclass, time, "superclass")
        before = mse_each(step.frozen("teacher")(noisy, time, target.cond), goal)  # l0, [B]
        forgets, keeps = step.student.all([(noisy, time, target.cond), (retained, time, superclass.cond)])
        return Losses(
            {
                "forget": negative_preference(mse_each(forgets, goal), before, self.config.beta),
                "retain": self.config.retain_weight * mse(keeps, retained_goal),
            }
        )


def negative_preference(loss: Tensor, before: Tensor, beta: float) -> Tensor:
    """-(2 / b) mean log sigmoid(b (l - l0)), from the samples' losses now and before, [B] each -> []."""
    return -2 / beta * logsigmoid(beta * (loss - before)).mean()
