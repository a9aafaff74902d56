"""The contract of a method: a frozen dataclass of options, and a few functions that can be compared with the paper.

A method is one file `methods/<name>.py` with two classes, `Config` and `Method`. A configuration selects it with
`method: {name: ...}`. A method never edits the training loop; its members declare what it needs from the loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.parts.trajectory import Trajectory
from sculpt_dist.config.load import merge_section
from sculpt_dist.config.schema import Concept
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.plugins import METHODS, plugin
from sculpt_dist.core.types import ConceptBatch, Losses, Stream, TextCond
from sculpt_dist.data.prompts import ConceptPrompts
from sculpt_dist.data.streams import Draws, StreamSpec
from sculpt_dist.engine.companion import Companion
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.optimizer import ShardedVector, sum_gradients
from sculpt_dist.engine.zero import FrozenWeights
from sculpt_dist.guards.base import Guard

Request = tuple[Tensor, Tensor, TextCond]  # noisy [B, C, H, W], time [B], cond


class Predictor:
    """A net as a method sees it: a call makes one prediction, `all` makes several in one batch."""

    def __init__(self, backbone: Backbone, net: nn.Module, frozen: FrozenWeights | None = None) -> None:
        """`frozen` swaps the net to an earlier state; such a predictor gives no gradient."""
        self.backbone, self.net, self.frozen = backbone, net, frozen

    def __call__(self, noisy: Tensor, time: Tensor, cond: TextCond) -> Tensor:
        """[B, C, H, W], [B], cond -> [B, C, H, W]."""
        return self.all([(noisy, time, cond)])[0]

    def all(self, requests: Sequence[Request]) -> list[Tensor]:
        """The predictions for all requests, run as one batch: sharding works best with one forward per backward."""
        noisy = torch.cat([request[0] for request in requests])
        time = torch.cat([request[1] for request in requests])
        cond = TextCond.cat([request[2] for request in requests])
        if self.frozen is None:
            together = self.backbone.denoise(self.net, noisy, time, cond)
        else:
            with self.frozen():
                together = self.backbone.denoise(self.net, noisy, time, cond)
        return list(torch.split(together, [len(request[0]) for request in requests]))

    def for_inputs(self, noisy: Tensor, time: Tensor, cond: TextCond) -> Tensor:
        """A prediction for gradients to its inputs alone. DeepSpeed takes any backward of its engine for a step's."""
        net: nn.Module = getattr(self.net, "module", self.net)
        return self.backbone.denoise(net, noisy, time, cond)

    def without_gradient(self, requests: Sequence[Request]) -> list[Tensor]:
        """The same as `all`, without gradient."""
        with torch.no_grad():
            return self.all(requests)


@dataclass(frozen=True)
class Step:
    """What a method sees of one micro-batch of one step."""

    student: Predictor
    teacher: Predictor | None  # the net before this concept, without gradient; only with `needs_teacher`
    original: Predictor | None  # the net before the first concept; only with `needs_original`
    batch: ConceptBatch
    backbone: Backbone
    rng: Draws
    trajectory: Trajectory  # of latents that the student draws, kept from update to update
    update: int  # 0 .. updates - 1; 0 while saliency is collected
    progress: float  # update / updates, 0..1

    def frozen(self, source: str) -> Predictor:
        """The frozen net that an option names: teacher or original."""
        chosen = {"teacher": self.teacher, "original": self.original}[source]
        assert chosen is not None, f"a method that uses the {source} must set needs_{source}"
        return chosen

    def corrupted(self, stream: Stream, time: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """(noisy, goal) of a stream's latents at `time` [B], each [B, C, H, W]; `what` keys the noise."""
        noise = self.rng.at(stream.positions).normal(what, stream.latents.shape[1:])
        return self.backbone.corrupt(stream.latents, noise, time), self.backbone.goal(stream.latents, noise, time)

    def student_latents(self, index: int, steps: int, guidance: float) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Latents that the student draws of the target's prompts.

        Returns the latents [B, C, H, W] before step `index` of `steps`, their time [B], and the prompts: those of the
        batch where a trajectory begins, and the same ones to its end.
        """
        walk = self.trajectory
        if not walk.continues_at(index):
            noise = self.rng.normal("trajectory", self.backbone.latent_shape)
            walk.begin(noise, self.batch.target.prompts, steps)
        cond, empty = self.backbone.embed(walk.prompts), self.empty(len(walk.prompts))
        latents, time = walk.advance_to(index, steps, self.student, cond, empty, guidance)
        return latents, time, walk.prompts

    def fresh_latents(
        self,
        index: int,
        steps: int,
        guidance: float,
        prompts: Sequence[str],
        cond: TextCond | None = None,
        what: str = "trajectory",
    ) -> tuple[Tensor, Tensor]:
        """(latents [B, C, H, W], their time [B]) that the student draws from new noise, before step `index` of `steps`.

        `cond` in place of the embedding of the prompts; `what` keys the noise. The trajectory may be continued.
        """
        self.trajectory.begin(self.rng.normal(what, self.backbone.latent_shape), prompts, steps)
        drawn_for = self.backbone.embed(prompts) if cond is None else cond
        empty = self.empty(len(prompts))
        return self.trajectory.advance_to(index, steps, self.student, drawn_for, empty, guidance)

    def empty(self, size: int) -> TextCond:
        """The condition that guidance leads away from when there is no negative prompt, [B, ...]."""
        return self.backbone.embed([""] * size, negative=True)


def matrices(groups: Mapping[str, tuple[str, ...]], name: str) -> list[str]:
    """The matrices and kernels of one group of the backbone. Raises ConfigError with the groups there are."""
    if name not in groups:
        raise ConfigError(f"method: the model has no group {name!r}; there are: {', '.join(sorted(groups))}")
    kept = set(groups["matrices"])
    return [parameter for parameter in groups[name] if parameter in kept]


LossFunction = Callable[[Step], Losses]


@dataclass(frozen=True)
class Setup:
    """What a method may use before a concept begins."""

    concept: int  # its place in the sequence
    backbone: Backbone
    updates: int
    prompts: ConceptPrompts
    concepts: Sequence[Concept] = ()  # of the whole run
    all_prompts: Sequence[ConceptPrompts] = ()  # theirs
    seed: int = 0  # train.seed
    group: Group | None = None  # the ranks; None where a method is prepared without a run


class Method(ABC):
    """A method that trains: its losses, and what the loop must know about them.

    Only `trainable`, `saliency` and `losses` are required.
    """

    kind: ClassVar[str] = "trains"
    needs_teacher = True  # whether it uses the net from before the concept; False saves a copy of what it trains
    needs_original = False  # whether it uses the net from before the first concept
    calibration_images = 0  # images per object and style that every candidate draws for `judge`
    companion: Companion | None = None  # a small net that trains beside the student
    rank_per_concept = False  # whether each concept has its own ranks of the adapter, which alone train in its turn
    reads_attention = False  # whether its losses read attention maps, which a recomputed or compiled forward lacks
    takes_together = True  # whether several concepts may train at once (`train.together`)
    reference_mask = False  # mask and schedule behave as in the published code (see dm_cal.REFERENCE)

    @abstractmethod
    def trainable(self, groups: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
        """Names of the parameters that may move, from the backbone's groups; matrices only, as biases stay frozen."""

    def adapter(self, groups: Mapping[str, tuple[str, ...]]) -> Mapping[str, Any] | None:
        """Keyword arguments of peft.LoraConfig, for a method that trains an adapter instead of the net's weights."""
        return None

    def refine(self, backbone: Backbone, concepts: Sequence[ConceptPrompts]) -> Mapping[str, Tensor]:
        """New values of weights that stay frozen, by their stored names, set before the first concept trains."""
        return {}

    def fusion(self) -> Callable[[str, Tensor], Tensor] | None:
        """What becomes of the trained parameters at the end of the concept: (name, whole) -> whole; None: nothing."""
        return None

    def streams(self) -> Sequence[StreamSpec]:
        """The streams of samples that a step receives."""
        return (StreamSpec("target"), StreamSpec("superclass"))

    def extra_concepts(self, setup: Setup) -> Mapping[str, Sequence[str]]:
        """Names of further concepts by source; the base model draws their samples, and streams may name the source."""
        return {}

    def prepare(self, setup: Setup) -> Method:
        """The method for one concept; itself where nothing depends on the concept."""
        return self

    @abstractmethod
    def saliency(self, step: Step) -> Losses:
        """The loss whose gradient scores the weights while none of them moves."""

    @abstractmethod
    def losses(self, step: Step) -> Losses:
        """The training loss."""

    def loss_groups(self) -> Sequence[LossFunction]:
        """Losses that each get their own reduced gradient in a step; `combine` then joins these."""
        return (self.losses,)

    def combine(self, gradients: Sequence[ShardedVector]) -> ShardedVector:
        """Combine the gradients of the loss groups, in their order, into one. They are sharded; `dot` is global."""
        return sum_gradients(gradients)

    def alone(self, progress: float) -> LossFunction | None:
        """What is computed in place of the losses while only the companion trains, without gradient to the net."""
        return None

    def candidate_every(self, updates: int) -> int:
        """Number of updates after which the weights become a candidate result; 0 means only the last weights count."""
        return 0

    def judge(self, recent: Mapping[str, float]) -> float:
        """Score of a candidate, lower is better, from the mean of each loss term since the previous candidate.

        With `calibration_images`, `recent` also contains UA, IRA and CRA of images that the candidate drew with
        separate seeds.
        """
        raise NotImplementedError(f"{type(self).__name__} names candidates but does not judge them")


class Editor(ABC):
    """A method in closed form: no steps, no samples and no engine. All concepts are edited at once."""

    kind: ClassVar[str] = "edits"

    @abstractmethod
    def edit(self, backbone: Backbone, concepts: Sequence[ConceptPrompts]) -> Mapping[str, Tensor]:
        """New values of the parameters of `backbone.net` that change, by name, the same on every rank."""


def load_method(options: Mapping[str, Any]) -> Method | Editor | Guard:
    """The method that `method.name` selects; its options are checked like all other keys. Raises ConfigError."""
    module = plugin(METHODS, options.get("name", "dm_cal"), "method.name")
    found: Method | Editor | Guard = module.Method(merge_section(module.Config, options, "method"))
    return found
