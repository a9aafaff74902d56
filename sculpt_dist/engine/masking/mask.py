"""The dynamic mask: which weights may move, kept beside the optimizer's shards, exact over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt_dist.core.files import derived_seed
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.masking.select import Part, choose, chosen, quantiles
from sculpt_dist.engine.sharding.shards import Fragment, Shard
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


class DynamicMask:
    """Opens the most salient weights, and at a turnover swaps the least salient open ones for the most salient closed ones.

    A weight's byte in `Shard.opened` is 0 while closed and else the generation in which it was opened; `births[g]` is the number
    of updates done when generation g opened, from which each weight's own Adam bias correction follows.
    """

    def __init__(
        self, shards: list[Shard], sizes: Mapping[str, int], group: Group | None, settings: MaskSettings
    ) -> None:
        """`group` is None where every rank holds all weights (stage 0)."""
        self.shards, self.sizes, self.group, self.settings = shards, dict(sizes), group, settings
        self.births: list[int] = [0, 0]  # of generation 0 (closed, unused) and 1
        self.swapped = 0
        self.overlap = 1.0
        self.spread: dict[
            float, float
        ] = {}  # share -> |saliency| at the last build or turnover; empty where the mask is random
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
        for shard in self.shards:
            shard.opened.zero_()
            if self.settings.resets_moments:
                shard.moments.reset()
        self._swap(torch.zeros_like(self._keep_counts()), self._keep_counts(), 1)

    def turn_over(self, share: float, updates_done: int) -> None:
        """Close the n least salient open weights, open the n most salient closed ones, n = max(1, int(share open)) per segment.

        The open count is conserved. Moments of closed and of opened weights are zero, and saliency starts anew.
        """
        generation = len(self.births) if self.settings.resets_moments else 1
        assert generation <= MAX_GENERATIONS, "more turnovers than a byte can number"
        counts = torch.tensor([turnover_count(int(k), share) for k in self._keep_counts()])
        counts = torch.minimum(counts, self._segment_sizes() - self._keep_counts())  # no more than are closed
        self._swap(counts, counts, generation)
        if self.settings.resets_moments:
            self.births.append(updates_done)
        self.swapped = int(counts.sum())
        self.overlap = 1 - self.swapped / self.open_count if self.open_count else 1.0

    def _swap(self, closing: Tensor, opening: Tensor, generation: int) -> None:
        """Close and open so many weights of each segment, by what was collected, and forget that."""
        self.selections += 1
        fragments = self._fragments()
        parts = [Part(self._keys(shard, f), shard.opened[f.here], f.index) for shard, f in fragments]
        segments = (
            torch.arange(len(self.sizes))
            if self.settings.scope == "matrix"
            else torch.zeros(len(self.sizes), dtype=torch.long)
        )
        choice = choose(parts, segments, closing, opening, self.group)
        self.spread = {} if self.settings.saliency == "random" else quantiles(choice.histogram, QUANTILES)
        for (shard, f), part, cut in zip(fragments, parts, choice.cuts):
            for here, closes, opens in chosen(part, cut):
                opened = part.opened[here]
                opened.mul_(1 - closes).add_(opens, alpha=generation)
                if self.settings.resets_moments:
                    shard.moments.reopen(f.offset + here.start, opens | closes, opened)
        for shard in self.shards:
            shard.saliency.zero_()

    @property
    def planned_open(self) -> int:
        """How many weights a built mask opens."""
        return int(self._keep_counts().sum())

    def _fragments(self) -> list[tuple[Shard, Fragment]]:
        return [(shard, fragment) for shard in self.shards for fragment in shard.fragments]

    def _keys(self, shard: Shard, f: Fragment) -> Callable[[slice], Tensor]:
        """What gives the sort keys of a slice of the fragment."""
        if self.settings.saliency == "random":
            rng = torch.Generator().manual_seed(derived_seed(self.settings.seed, self.concept, self.selections, f.name))
            whole = torch.rand(
                self.sizes[f.name], generator=rng
            )  # of the whole matrix, so that every rank count agrees
            collected = whole[f.start : f.start + f.numel].to(
                shard.saliency.device, copy=True
            )  # the whole one is let go
        else:
            collected = shard.saliency[f.here]
        return lambda here: sort_keys(collected[here])

    def _segment_sizes(self) -> Tensor:  # int64 [S]
        sizes = torch.tensor(list(self.sizes.values()))
        return sizes if self.settings.scope == "matrix" else sizes.sum().view(1)

    def _keep_counts(self) -> Tensor:  # int64 [S]
        return torch.tensor([int(self.settings.keep * int(n)) for n in self._segment_sizes()])
