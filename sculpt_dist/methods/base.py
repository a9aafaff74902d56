"""What a method is: its own frozen config dataclass plus functions that a reviewer can hold beside the paper.

A method is one file `methods/<name>.py` with two classes, `Config` and `Method`; a config file names it by `method: {name: ...}`. It
never edits the loop: what it needs of the loop it says through the members of `Method`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.parts.trajectory import Trajectory
from sculpt_dist.config.schema import Concept
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import ConceptBatch, Losses, Stream, TextCond
from sculpt_dist.data.prompts import ConceptPrompts
from sculpt_dist.data.streams import Draws
from sculpt_dist.engine.optimizer import ShardedVector, sum_gradients
from sculpt_dist.engine.zero import FrozenWeights

Request = tuple[Tensor, Tensor, TextCond]  # noisy [B, C, H, W], time [B], cond


class Predictor:
    """A net as a method sees it: one prediction by a call, several together by `all`."""

    def __init__(self, backbone: Backbone, net: nn.Module, frozen: FrozenWeights | None = None) -> None:
        """`frozen` swaps the net to an earlier state; such a predictor gives no gradient."""
        self.backbone, self.net, self.frozen = backbone, net, frozen

    def __call__(self, noisy: Tensor, time: Tensor, cond: TextCond) -> Tensor:
        """[B, C, H, W], [B], cond -> [B, C, H, W]."""
        return self.all([(noisy, time, cond)])[0]

    def all(self, requests: Sequence[Request]) -> list[Tensor]:
        """The predictions for all requests, run as one batch: one forward per backward is what sharding likes best."""
        noisy = torch.cat([request[0] for request in requests])
        time = torch.cat([request[1] for request in requests])
        cond = TextCond.cat([request[2] for request in requests])
        if self.frozen is None:
            together = self.backbone.denoise(self.net, noisy, time, cond)
        else:
            with self.frozen():
                together = self.backbone.denoise(self.net, noisy, time, cond)
        return list(together.split([len(request[0]) for request in requests]))

    def without_gradient(self, requests: Sequence[Request]) -> list[Tensor]:
        """As `all`, without gradient."""
        with torch.no_grad():
            return self.all(requests)


@dataclass(frozen=True)
class Step:
    """What one micro-batch of one step micro_steps to a method."""

    student: Predictor
    teacher: Predictor  # the net before this concept, without gradient
    original: Predictor | None  # the net before the first concept; only where `needs_original`
    batch: ConceptBatch
    backbone: Backbone
    rng: Draws
    trajectory: Trajectory  # of latents that the student draws, kept from update to update
    update: int  # 0 .. updates - 1; 0 while collecting
    progress: float  # update / updates, 0..1

    def corrupted(self, stream: Stream, time: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """(noisy, goal) of a stream's latents at `time` [B], each [B, C, H, W]; `what` names its noise."""
        noise = self.rng.normal(what, stream.latents.shape[1:])
        return self.backbone.corrupt(stream.latents, noise, time), self.backbone.goal(stream.latents, noise, time)

    def student_latents(self, index: int, steps: int, guidance: float) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Latents [B, C, H, W] that the student draws of the target's prompts, before step `index` of `steps`, their time [B], and those
        prompts: the batch's where a walk begins, and the same to its end.
        """
        walk = self.trajectory
        if not walk.continues_at(index):
            walk.begin(self.rng.normal("trajectory", self.backbone.latent_shape), self.batch.target.prompts, steps)
        cond, empty = self.backbone.embed(walk.prompts), self.empty(len(walk.prompts))
        latents, time = walk.advance_to(index, steps, self.student, cond, empty, guidance)
        return latents, time, walk.prompts

    def empty(self, size: int) -> TextCond:
        """The condition that guidance leads away from where there is no negative prompt, [B, ...]."""
        return self.backbone.embed([""] * size, negative=True)


def matrices(groups: Mapping[str, tuple[str, ...]], name: str) -> list[str]:
    """The matrices and kernels of one group of the backbone. Raises ConfigError that lists the groups when there is none of this name."""
    if name not in groups:
        raise ConfigError(f"method: the model has no group {name!r}; there are: {', '.join(sorted(groups))}")
    kept = set(groups["matrices"])
    return [parameter for parameter in groups[name] if parameter in kept]


LossFunction = Callable[[Step], Losses]


@dataclass(frozen=True)
class Setup:
    """What a method may look at before a concept: which concept of how many, and the backbone."""

    concept: int
    backbone: Backbone
    updates: int
    prompts: ConceptPrompts
    concepts: Sequence[Concept] = ()  # of the whole run


class Method(ABC):
    """Losses, and what the loop must know of them. Only `trainable`, `saliency` and `losses` are required."""

    needs_original = False
    samples: tuple[str, ...] = (
        "target",
        "superclass",
    )  # roles whose samples it trains on; of the others only prompts are streamed
    anchors: tuple[str, ...] = ()  # sources of the anchor stream: targets (earlier ones), superclass, keep
    calibration_images = 0  # per object and style, drawn of every candidate for `judge`
    reference_mask = False  # the mask and its clock as published code has them (see dm_cal.REFERENCE)

    @abstractmethod
    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        """Names of the parameters that may move, from the backbone's groups; matrices, as biases stay frozen."""

    def adapter(self, groups: Mapping[str, tuple[str, ...]]) -> Mapping[str, Any] | None:
        """Keyword arguments of peft.LoraConfig, where an adapter trains in place of the net's own parameters."""
        return None

    def distractors(self, setup: Setup) -> Sequence[str]:
        """Concepts whose samples the base model draws for the distractor stream; none: there is no such stream."""
        return ()

    def prepare(self, setup: Setup) -> Method:
        """The method for one concept; itself where nothing depends on it."""
        return self

    @abstractmethod
    def saliency(self, step: Step) -> Losses:
        """The loss whose gradient scores the weights while none of them moves."""

    @abstractmethod
    def losses(self, step: Step) -> Losses:
        """The training loss."""

    def loss_groups(self) -> Sequence[LossFunction]:
        """Losses that each get their own reduced gradient in a step, which `combine` then joins."""
        return (self.losses,)

    def combine(self, gradients: Sequence[ShardedVector]) -> ShardedVector:
        """One gradient from those of the loss groups, in their order; they are sharded, `dot` is global."""
        return sum_gradients(gradients)

    def candidate_every(self, updates: int) -> int:
        """Consider the weights as this concept's result after every so many updates; 0 = only the last."""
        return 0

    def judge(self, recent: Mapping[str, float]) -> float:
        """Score of a candidate, lower is better, from the mean of each loss term since the candidate before.

        With `calibration_images` also from the UA, IRA and CRA of images that the candidate drew, by seeds of their own.
        """
        raise NotImplementedError(f"{type(self).__name__} names candidates but does not judge them")


class Editor(ABC):
    """A closed form: no steps, no samples and no engine. `methods/<name>.py` then has `Config` and `Editor` in place of `Method`."""

    @abstractmethod
    def edit(self, backbone: Backbone, concepts: Sequence[ConceptPrompts]) -> Mapping[str, Tensor]:
        """New values of the parameters of `backbone.net` that change, by name, on every rank alike."""
