"""The masked step: AdamW on this rank's flat shards that leaves closed weights bit-identical."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt_dist.engine.group import Group
from sculpt_dist.engine.masking.mask import DynamicMask
from sculpt_dist.engine.optimizer.kernels import Kernel, Rule
from sculpt_dist.engine.optimizer.kernels.plain import Plain
from sculpt_dist.engine.sharding.shards import CHUNK, Shard
from sculpt_dist.maths.saliency import accumulate

Combine = Callable[[Sequence["ShardedVector"]], "ShardedVector"]
EPSILON = 1e-8


class ShardedVector:
    """One number per trainable weight, sharded like the optimizer: what rules that combine gradients compute with."""

    def __init__(
        self, pieces: Sequence[Tensor], group: Group | None, shards: Sequence[Shard] = (), parameters: int = 0
    ) -> None:
        """`shards`: where the pieces [n] belong, and `parameters`: how many they are of, for sums by parameter."""
        self.pieces, self.group, self.shards, self.parameters = list(pieces), group, shards, parameters

    def dot(self, other: ShardedVector) -> float:
        """The inner product over all weights of all ranks."""
        total = sum(map(_dot, self.pieces, other.pieces), torch.zeros(1, dtype=torch.float64).to(self.pieces[0].device))
        return float(total if self.group is None else self.group.sum(total))

    def plus(self, other: ShardedVector, scale: float = 1.0) -> ShardedVector:
        """self + scale other."""
        return self._like([a.add(b, alpha=scale) for a, b in zip(self.pieces, other.pieces)])

    def dots(self, other: ShardedVector) -> Tensor:
        """The inner product of each parameter over all ranks, in the order of the net, fp64 [parameters] on the CPU."""
        totals = torch.zeros(self.parameters, dtype=torch.float64, device=self.pieces[0].device)
        for a, b, shard in zip(self.pieces, other.pieces, self.shards):
            for f in shard.fragments:
                totals[f.index] += _dot(a[f.here], b[f.here])
        return (totals if self.group is None else self.group.sum(totals)).cpu()

    def plus_each(self, other: ShardedVector, scales: Tensor) -> ShardedVector:
        """self + scale other, with a scale for each parameter, [parameters] on the CPU."""
        pieces = [piece.clone() for piece in self.pieces]
        for piece, added, shard in zip(pieces, other.pieces, self.shards):
            for f in shard.fragments:
                piece[f.here].add_(added[f.here], alpha=float(scales[f.index]))
        return self._like(pieces)

    def _like(self, pieces: Sequence[Tensor]) -> ShardedVector:
        return ShardedVector(pieces, self.group, self.shards, self.parameters)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of two [n] in fp64, in chunks, as a copy of a whole shard would be large."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for x, y in zip(a.split(CHUNK), b.split(CHUNK)):
        total += x.double() @ y.double()
    return total


@dataclass(frozen=True)
class Pull:
    """The penalty l1 |w - w0| + l2 (w - w0)^2 / 2 on every open weight (L1-SP and L2-SP, Li et al., arXiv 1802.01483).

    w0 is `origin`, a copy of this rank's shards, [n] each.
    """

    origin: Sequence[Tensor]
    l1: float
    l2: float

    def add_to(self, gradient: ShardedVector, shards: Sequence[Shard]) -> None:
        """Add the penalty's gradient in place."""
        for piece, shard, origin in zip(gradient.pieces, shards, self.origin):
            for span in shard.spans:
                moved = shard.flat[span] - origin[span]
                piece[span].add_(moved, alpha=self.l2).add_(moved.sign_(), alpha=self.l1)


def sum_gradients(gradients: Sequence[ShardedVector]) -> ShardedVector:
    """The default rule: the sum of the gradients of all loss groups."""
    total = gradients[0]
    for gradient in gradients[1:]:
        total = total.plus(gradient)
    return total


class MaskedAdamW(torch.optim.Optimizer):
    """The client optimizer that DeepSpeed steps, in every stage, on the flat fp32 shards that this rank owns.

    `phase` decides what a step does. `hold` does nothing. `collect` adds the reduced gradient to the saliency and moves
    nothing. `capture` keeps it as the gradient of one loss group. `train` adds it to the saliency, combines it with the
    captured ones, adds `pull`, clips it by the norm of its open part over all ranks, and moves the open weights.

    Adam follows Kingma and Ba (arXiv 1412.6980, algorithm 1) with decoupled decay (Loshchilov and Hutter, arXiv
    1711.05101); each weight counts its updates from the moment it was opened. A non-finite gradient gives a non-finite
    `grad_norm`; with clipping, no weight has moved then.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        betas: tuple[float, float],
        weight_decay: float,
        clip: float,
        kernel: Kernel | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.betas, self.weight_decay, self.clip = betas, weight_decay, clip
        self.kernel = kernel or Plain()
        self.phase = "hold"
        self.statistic = "abs_sum"
        self.combine: Combine = sum_gradients
        self.pull: Pull | None = None
        self.updates = 0
        self.steps_seen = 0
        self._grad_norm = self._moved = torch.zeros((), dtype=torch.float64)
        self._captured: list[ShardedVector] = []

    def begin(self) -> None:
        """Count updates from 0, with nothing measured yet."""
        self.updates = 0
        self._grad_norm, self._moved = torch.zeros_like(self._grad_norm), torch.zeros_like(self._moved)

    def attach(self, shards: list[Shard], mask: DynamicMask, group: Group | None) -> None:
        """Connect the flat tensors to shards and mask. `group` is None when every rank holds all weights."""
        self.shards, self.mask, self.group = shards, mask, group
        self._grad_norm = self._moved = torch.zeros((), dtype=torch.float64, device=shards[0].flat.device)
        for shard in shards:
            shard.moments.repack = self.kernel.repack

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # DeepSpeed passes no closure
        self.steps_seen += 1
        if self.phase == "hold":
            return
        gradients = [shard.gradient() for shard in self.shards]
        statistic = None if self.statistic == "random" else self.statistic
        if self.phase == "train" and not self._captured and self.pull is None:
            self._train(self._vector(gradients), statistic)
            return
        if statistic is not None:
            for shard, gradient in zip(self.shards, gradients):
                accumulate(shard.saliency, gradient, statistic)
        if self.phase == "capture":
            self._captured.append(self._vector([gradient.clone() for gradient in gradients]))
        elif self.phase == "train":
            combined = self.combine([*self._captured, self._vector(gradients)])
            self._captured = []
            if self.pull is not None:
                self.pull.add_to(combined, self.shards)
            self._train(combined, None)

    def measures(self) -> tuple[Tensor, Tensor]:
        """The last update's gradient norm (see `grad_norm`), and this rank's sum of squared moves, without lr.

        fp64 [] each, on the device: nothing waits for them.
        """
        return self._grad_norm, self._moved

    @property
    def grad_norm(self) -> float:
        """Norm of the last update's masked gradient over all ranks, before clipping. Synchronises with a GPU."""
        return float(self._grad_norm)

    def update_norm(self) -> float:
        """Norm of the last update over all weights. All ranks must call this: it sums one number over them."""
        total = self._moved.clone()
        return self.param_groups[0]["lr"] * math.sqrt(total if self.group is None else self.group.sum(total))

    def _vector(self, pieces: Sequence[Tensor]) -> ShardedVector:
        return ShardedVector(pieces, self.group, self.shards, len(self.mask.sizes))

    def _train(self, gradient: ShardedVector, statistic: str | None) -> None:
        """One pass over the weights; two with clipping, which needs the norm first. Never synchronises with a GPU."""
        device = gradient.pieces[0].device
        pairs = list(zip(self.shards, gradient.pieces))
        scale = torch.ones((), device=device)
        if self.clip:
            self._grad_norm = self._norm([self.kernel.collect(shard, piece, statistic) for shard, piece in pairs])
            scale = (self.clip / (self._grad_norm + 1e-6)).clamp(max=1.0)
            scale = torch.where(torch.isfinite(self._grad_norm), scale, math.nan).float()
            statistic = None
        self.updates += 1
        beta1, beta2 = self.betas
        ages = (self.updates - torch.tensor(self.mask.births, dtype=torch.float64)).clamp(min=1)
        factors = (1 / (1 - beta1**ages)).float(), (1 - beta2**ages).rsqrt().float()
        first, second = (factor.to(device, non_blocking=True) for factor in factors)
        rule = Rule(self.param_groups[0]["lr"], beta1, beta2, EPSILON, self.weight_decay, scale, first, second)
        sums = [self.kernel.update(shard, piece, statistic, rule) for shard, piece in pairs]
        if not self.clip:
            self._grad_norm = self._norm([squares for squares, _ in sums])
        self._moved = torch.stack([moves for _, moves in sums]).sum()

    def _norm(self, squares: Sequence[Tensor]) -> Tensor:
        total = torch.stack(list(squares)).sum()
        return (total if self.group is None else self.group.sum(total)).sqrt()
