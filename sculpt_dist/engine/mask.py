"""The dynamic mask: which weights may move, kept beside the optimizer's shards, exact over all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

import torch
from torch import Tensor

from sculpt_dist.engine.group import Group
from sculpt_dist.engine.select import LARGEST_KEY, Candidates, choose_largest, kth_largest
from sculpt_dist.engine.shards import Fragment, Shard
from sculpt_dist.errors import NonFiniteError
from sculpt_dist.files import derived_seed
from sculpt_dist.maths.saliency import sort_keys
from sculpt_dist.maths.schedules import turnover_count

MAX_GENERATIONS = 255
QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class MaskSettings:
    keep: float
    scope: str  # matrix or global
    saliency: str
    seed: int  # of the random statistic
    resets_moments: bool = True  # False: closed weights go on moving on old momentum, as published code lets them
    clears_saliency: bool = True  # at build; a turnover always does


class DynamicMask:
    """Opens the most salient weights, and at a turnover swaps the least salient open ones for the most salient closed ones.

    A weight's byte in `Shard.opened` is 0 while closed and else the generation in which it was opened; `births[g]` is the number
    of updates done when generation g opened, from which each weight's own Adam bias correction follows.
    """

    def __init__(self, shards: list[Shard], sizes: Mapping[str, int], group: Group | None, settings: MaskSettings) -> None:
        """`group` is None where every rank holds all weights (stage 0)."""
        self.shards, self.sizes, self.group, self.settings = shards, dict(sizes), group, settings
        self.births: list[int] = [0, 0]  # of generation 0 (closed, unused) and 1
        self.swapped = 0
        self.overlap = 1.0
        self.open_count = sum(self.sizes.values())
        self.concept, self.selections = 0, 0  # what the random statistic is keyed by

    def num_open(self) -> int:
        """Open weights over all ranks, counted."""
        count = torch.tensor([sum(int((shard.opened > 0).sum()) for shard in self.shards)])
        return int(count if self.group is None else self.group.sum(count.to(self.group.device)).cpu())

    def open_all(self) -> None:
        """Every weight may move: the state without a mask."""
        self.births = [0, 0]
        self.open_count = sum(self.sizes.values())
        for shard in self.shards:
            shard.opened.fill_(1)
            if shard.padding is not None:
                shard.opened.masked_fill_(shard.padding, 0)

    def build(self) -> None:
        """Open the int(keep n) most salient weights of each matrix (or of all); saliency starts anew."""
        self.births, self.swapped, self.overlap = [0, 0], 0, 1.0
        self.open_count = int(self._keep_counts().sum())
        self.selections += 1
        self._check_finite()
        fragments = self._fragments()
        parts = [Candidates(self._keys(shard, f), f.index) for shard, f in fragments]
        segments = torch.arange(len(self.sizes)) if self.settings.scope == "matrix" else torch.zeros(len(self.sizes), dtype=torch.long)
        for shard in self.shards:
            shard.opened.zero_()
        for (shard, f), chosen in zip(fragments, choose_largest(parts, segments, self._keep_counts(), self.group)):
            shard.opened[f.here] = chosen.to(torch.uint8)
        if self.settings.clears_saliency:
            self._forget_saliency()

    def turn_over(self, share: float, updates_done: int) -> None:
        """Close the n least salient open weights, open the n most salient closed ones, n = max(1, int(share open)) per segment.

        The open count is conserved. Moments of closed and of opened weights are zero, and saliency starts anew.
        """
        generation = len(self.births) if self.settings.resets_moments else 1
        assert generation <= MAX_GENERATIONS, "more turnovers than a byte can number"
        self.selections += 1
        self._check_finite()
        fragments = self._fragments()
        counts = torch.tensor([turnover_count(int(k), share) for k in self._keep_counts()])
        sizes = self._segment_sizes()
        counts = torch.minimum(counts, sizes - self._keep_counts())  # no more than are closed
        num = len(counts)
        per_slot = torch.arange(num) if self.settings.scope == "matrix" else torch.zeros(len(self.sizes), dtype=torch.long)
        parts = []
        for shard, f in fragments:
            keys, is_open = self._keys(shard, f), shard.opened[f.here] > 0
            parts.append(Candidates(torch.where(is_open, LARGEST_KEY - keys, -1), f.index))
            parts.append(Candidates(torch.where(is_open, -1, keys), len(self.sizes) + f.index))
        chosen = choose_largest(parts, torch.cat([per_slot, per_slot + num]), counts.repeat(2), self.group)
        for (shard, f), closing, opening in zip(fragments, chosen[0::2], chosen[1::2]):
            shard.opened[f.here].masked_fill_(closing, 0).masked_fill_(opening, generation)
            for moments in (shard.momentum, shard.variance) if self.settings.resets_moments else ():
                moments[f.here].masked_fill_(closing | opening, 0.0)
        if self.settings.resets_moments:
            self.births.append(updates_done)
        self.swapped = int(counts.sum())
        self.overlap = 1 - self.swapped / self.open_count if self.open_count else 1.0
        self._forget_saliency()

    def saliency_quantiles(self) -> dict[str, float]:
        """|saliency| at the shares QUANTILES of all trained weights: exact elements, torch.quantile's `lower` over all ranks' shards.

        By counts of the numbers' bits: no sort, no rank sees another's values, and 2.4 MB are summed. Before `build` or `turn_over`, which clear the
        saliency; all ranks enter, and all get the same. Empty where the mask is random.
        """
        if self.settings.saliency == "random":
            return {}
        n = sum(self.sizes.values())
        mine = [self._keys(shard, f) for shard, f in self._fragments()]
        keys = kth_largest(mine, torch.tensor([n - int(share * (n - 1)) for share in QUANTILES]), self.group)
        return dict(zip(map(str, QUANTILES), keys.to(torch.int32).view(torch.float32).tolist()))

    @property
    def planned_open(self) -> int:
        """How many weights a built mask opens."""
        return int(self._keep_counts().sum())

    def _check_finite(self) -> None:
        bad = torch.tensor([float(any(not bool(shard.saliency.isfinite().all()) for shard in self.shards))])
        if (bad if self.group is None else self.group.max(bad.to(self.group.device))).any():
            raise NonFiniteError("the collected gradients are not finite, so no mask can be made; look at the data of this concept")

    def _fragments(self) -> list[tuple[Shard, Fragment]]:
        return [(shard, fragment) for shard in self.shards for fragment in shard.fragments]

    def _keys(self, shard: Shard, f: Fragment) -> Tensor:  # int32 [f.numel]
        if self.settings.saliency == "random":
            rng = torch.Generator().manual_seed(derived_seed(self.settings.seed, self.concept, self.selections, f.name))
            whole = torch.rand(self.sizes[f.name], generator=rng)  # of the whole matrix, so that every rank count agrees
            return sort_keys(whole[f.start : f.start + f.numel].to(shard.saliency.device))
        return sort_keys(shard.saliency[f.here])

    def _segment_sizes(self) -> Tensor:  # int64 [S]
        sizes = torch.tensor(list(self.sizes.values()))
        return sizes if self.settings.scope == "matrix" else sizes.sum().view(1)

    def _keep_counts(self) -> Tensor:  # int64 [S]
        return torch.tensor([int(self.settings.keep * int(n)) for n in self._segment_sizes()])

    def _forget_saliency(self) -> None:
        for shard in self.shards:
            shard.saliency.zero_()
