"""The masked step: Adam on this rank's flat shard, in which closed weights stay bit-identical."""

from __future__ import annotations

import math
from typing import Callable, Sequence

import torch
from torch import Tensor

from sculpt_dist.engine.group import Group
from sculpt_dist.engine.mask import DynamicMask
from sculpt_dist.engine.shards import Shard
from sculpt_dist.errors import NonFiniteError
from sculpt_dist.maths.saliency import accumulate

Combine = Callable[[Sequence["ShardedVector"]], "ShardedVector"]
EPSILON = 1e-8
CHUNK = 1 << 18  # weights worked on together: they stay in the cache


class ShardedVector:
    """One number per trainable weight, spread over the ranks like the optimizer: what combining rules compute with."""

    def __init__(self, pieces: Sequence[Tensor], group: Group | None) -> None:
        self.pieces, self.group = list(pieces), group

    def dot(self, other: ShardedVector) -> float:
        """The inner product over all weights of all ranks."""
        total = torch.zeros(1, dtype=torch.float64, device=self.pieces[0].device)
        for a, b in zip(self.pieces, other.pieces):
            for x, y in zip(a.split(CHUNK), b.split(CHUNK)):  # chunks: no fp64 copy of a whole shard
                total += x.double() @ y.double()
        return float(total if self.group is None else self.group.sum(total))

    def plus(self, other: ShardedVector, scale: float = 1.0) -> ShardedVector:
        """self + scale other."""
        return ShardedVector([a.add(b, alpha=scale) for a, b in zip(self.pieces, other.pieces)], self.group)


def sum_gradients(gradients: Sequence[ShardedVector]) -> ShardedVector:
    """The plain rule: the gradients of all loss groups added."""
    total = gradients[0]
    for gradient in gradients[1:]:
        total = total.plus(gradient)
    return total


class MaskedAdamW(torch.optim.Optimizer):
    """The client optimizer that DeepSpeed steps, in every stage, on the flat fp32 shard(s) that this rank owns.

    `phase` says what a step does: `hold` nothing; `collect` adds the reduced gradient to the saliency and moves nothing; `capture`
    keeps it as one loss group's gradient; `train` adds it to the saliency, combines it with the captured ones, and then in this
    order: norm of the masked gradient, finite check over all ranks, clip, masked update. Adam follows Kingma and Ba (arXiv
    1412.6980, algorithm 1) with decoupled decay (Loshchilov and Hutter, arXiv 1711.05101), each weight counting its updates from
    when it was opened.
    """

    def __init__(self, parameters: Sequence[Tensor], betas: tuple[float, float], weight_decay: float, clip: float) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.betas, self.weight_decay, self.clip = betas, weight_decay, clip
        self.phase = "hold"
        self.statistic = "abs_sum"
        self.combine: Combine = sum_gradients
        self.updates = 0
        self.steps_seen = 0
        self.grad_norm = 0.0  # of the masked gradient, before clipping
        self._moved: Tensor | None = None  # [], this rank's sum of squares of the last update, without lr
        self._captured: list[ShardedVector] = []

    def attach(self, shards: list[Shard], mask: DynamicMask, group: Group | None) -> None:
        """Say what the flat tensors hold; `group` is None where every rank holds all weights."""
        self.shards, self.mask, self.group = shards, mask, group

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.steps_seen += 1
        if self.phase == "hold":
            return
        gradients = [shard.gradient() for shard in self.shards]
        if self.statistic != "random":
            for shard, gradient in zip(self.shards, gradients):
                accumulate(shard.saliency, gradient, self.statistic)
        if self.phase == "collect":
            return
        gradient = ShardedVector(gradients, self.group)
        if self.phase == "capture":
            self._captured.append(ShardedVector([piece.clone() for piece in gradient.pieces], self.group))
            return
        if self._captured:
            gradient = self.combine([*self._captured, gradient])
            self._captured = []
        self._train(gradient)

    def update_norm(self) -> float:
        """The norm of what the last update added to all weights; all ranks enter (one number is summed)."""
        if self._moved is None:
            return 0.0
        total = self._moved.clone()
        return self.param_groups[0]["lr"] * math.sqrt(total if self.group is None else self.group.sum(total))

    def _train(self, gradient: ShardedVector) -> None:
        for shard, piece in zip(self.shards, gradient.pieces):
            for g, opened in zip(piece.split(CHUNK), shard.opened.split(CHUNK)):
                _close(g, opened)
        self.grad_norm = math.sqrt(gradient.dot(gradient))
        if not math.isfinite(self.grad_norm):
            raise NonFiniteError(f"the gradient is not finite at update {self.updates}; weights are unchanged by this update")
        scale = min(1.0, self.clip / (self.grad_norm + 1e-6)) if self.clip else 1.0
        self.updates += 1
        self._moved = torch.zeros((), dtype=torch.float64, device=gradient.pieces[0].device)
        beta1, beta2 = self.betas
        ages = [max(1, self.updates - birth) for birth in self.mask.births]
        first = torch.tensor([1 - beta1**age for age in ages])  # [generations]
        second = torch.tensor([1 - beta2**age for age in ages])
        for shard, piece in zip(self.shards, gradient.pieces):
            if scale != 1.0:
                piece.mul_(scale)
            self._update(shard, piece, first.to(piece.device), second.to(piece.device))

    def _update(self, shard: Shard, gradient: Tensor, first: Tensor, second: Tensor) -> None:
        """One Adam update of the open weights; `gradient` [n] is already masked, so closed weights have zero moments."""
        lr, (beta1, beta2) = self.param_groups[0]["lr"], self.betas
        for at in range(0, len(gradient), CHUNK):
            here = slice(at, at + CHUNK)
            g, m, v, opened = gradient[here], shard.momentum[here], shard.variance[here], shard.opened[here]
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            if len(first) == 2:  # one generation: one correction for all
                move = (m / first[1]) / ((v / second[1]).sqrt_().add_(EPSILON))
            else:
                generation = opened.int()
                move = (m / first.index_select(0, generation)) / ((v / second.index_select(0, generation)).sqrt_().add_(EPSILON))
            weights = shard.flat[here]
            if self.weight_decay:
                move.add_(_close(weights.clone(), opened), alpha=self.weight_decay)
            weights.sub_(move, alpha=lr)
            self._moved += move @ move


def _close(values: Tensor, opened: Tensor) -> Tensor:
    """Zero where closed, in place; by bits, which a CPU does several times as fast as by a comparison."""
    values.view(torch.int32).bitwise_and_(opened.clamp(max=1).to(torch.int32).neg_())  # all bits, or none
    return values
