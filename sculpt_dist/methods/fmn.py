"""Forget-Me-Not: attention re-steering, which takes the image's attention away from the target's name.

Zhang et al., arXiv 2303.17591.

Let A be the softmax attention of a noisy image x_f of the target to the tokens of the target's name in its prompt, over
all layers and heads of the cross-attention:

    L = || A ||, the Frobenius norm for each sample, and the mean over samples

The published code takes one sample at a time, so that both agree. It first learns new tokens for the concept by textual
inversion; here the name's own tokens are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sculpt_dist.core.types import Losses
from sculpt_dist.data.streams import StreamSpec
from sculpt_dist.methods.base import Method as Base
from sculpt_dist.methods.base import Setup, Step, matrices
from sculpt_dist.methods.parts.names import padded, target_tokens


@dataclass(frozen=True)
class Config:
    """The options of fmn."""

    name: str = "fmn"
    """Name of this method."""
    trains: str = "cross_attention"
    """Group of parameters that trains; the published configuration trains all."""


class Method(Base):
    """Trains one group's matrices."""

    needs_teacher, reads_attention = False, True

    def __init__(self, config: Config, places: Mapping[str, Sequence[int]] = {}) -> None:
        """`places`: the tokens of the target's name in each of its prompts."""
        self.config, self.places = config, places

    def prepare(self, setup: Setup) -> Method:
        return Method(self.config, target_tokens(setup))

    def streams(self) -> Sequence[StreamSpec]:
        return (StreamSpec("target"),)

    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        return matrices(groups, self.config.trains)

    def saliency(self, step: Step) -> Losses:
        return self.losses(step)

    def losses(self, step: Step) -> Losses:
        target, backbone = step.batch.target, step.backbone
        time = backbone.sample_time(step.rng.uniform("time"))  # [B]
        noisy, _ = step.corrupted(target, time, "target")
        places = padded([self.places[prompt] for prompt in target.prompts], noisy.device)  # [B, n]
        with backbone.attention_maps(step.student.net, places, target.cond) as maps:
            step.student(noisy, time, target.cond)
        return Losses({"forget": attention_norm(maps.values()).mean()})


def attention_norm(maps: Iterable[Tensor]) -> Tensor:
    """The Frobenius norm of each sample's maps of all layers, [B, heads, N, n] each -> [B]."""
    squares = [one.float().square().flatten(1).sum(1) for one in maps]
    return sum(squares[1:], squares[0]).clamp(min=1e-20).sqrt()
