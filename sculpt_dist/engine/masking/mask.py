"""The dynamic mask: which weights may move. It lives in the optimizer's shards and is exact over all ranks."""

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
    """What the engine needs of the configuration's `mask` section."""

    keep: float  # share of weights that are open
    scope: str  # matrix or global
    saliency: str  # abs_sum, sum_abs, sum_sq or random
    seed: int  # of random saliency
    resets_moments: bool = True  # False: closed weights keep moving on old momentum, as in the published code


class DynamicMask:
    """Opens the most salient weights; a turnover swaps the least salient open ones for the most salient closed ones.

    A weight's byte in `Shard.opened` is 0 while it is closed, otherwise the generation in which it was opened.
    `births[g]` is the number of updates done when generation g was opened; each weight's Adam bias correction counts
    from there.
    """

    def __init__(
        self, shards: list[Shard], sizes: Mapping[str, int], group: Group | None, settings: MaskSettings
    ) -> None:
        """`group` is None when every rank holds all weights (stage 0)."""
        self.shards, self.sizes, self.group, self.settings = shards, dict(sizes), group, settings
        self.births: list[int] = [0, 0]  # of generations 0 (closed, unused) and 1
        self.swapped = 0
        self.overlap = 1.0
        # |saliency| by share of weights, at the last build or turnover; empty when the mask is random
        self.spread: dict[float, float] = {}
        self.open_count = sum(self.sizes.values())
        self.concept, self.selections = 0, 0  # the key of random saliency

    def num_open(self) -> int:
        """Count the open weights over all ranks."""
        count = torch.tensor([sum(int((shard.opened > 0).sum()) for shard in self.shards)])
        return int(count if self.group is None else self.group.sum(count.to(self.group.device)).cpu())

    def open_all(self) -> None:
        """Let every weight move: the state without a mask."""
        self.births = [0, 0]
        self.open_count = sum(self.sizes.values())
        for shard in self.shards:
            shard.opened.fill_(1)
            if shard.padding is not None:
                shard.opened.masked_fill_(shard.padding, 0)

    def open_where(self, chosen: Callable[[str, Tensor], Tensor]) -> None:
        """Let only the weights move that `chosen` names: (parameter, flat indices int64 [n]) -> bool [n]."""
        self.open_all()
        for shard, f in self._fragments():
            places = torch.arange(f.start, f.start + f.numel, device=shard.opened.device)
            shard.opened[f.here] = chosen(f.name, places).to(shard.opened.dtype)
        self.open_count = self.num_open()

    def build(self) -> None:
        """Open the int(keep n) most salient weights of each matrix (or of all together), and reset the saliency."""
        self.births, self.swapped, self.overlap = [0, 0], 0, 1.0
        self.open_count = int(self._keep_counts().sum())
        for shard in self.shards:
            shard.opened.zero_()
            if self.settings.resets_moments:
                shard.moments.reset()
        self._swap(torch.zeros_like(self._keep_counts()), self._keep_counts(), 1)

    def turn_over(self, share: float, updates_done: int) -> None:
        """Close the n least salient open weights and open the n most salient closed ones of each segment.

        n = max(1, int(share open)), so the number of open weights is conserved. Zeroes the moments of the swapped
        weights and resets the saliency.
        """
        generation = len(self.births) if self.settings.resets_moments else 1
        assert generation <= MAX_GENERATIONS, "more turnovers than a byte can count"
        counts = torch.tensor([turnover_count(int(k), share) for k in self._keep_counts()])
        counts = torch.minimum(counts, self._segment_sizes() - self._keep_counts())  # at most as many as are closed
        self._swap(counts, counts, generation)
        if self.settings.resets_moments:
            self.births.append(updates_done)
        self.swapped = int(counts.sum())
        self.overlap = 1 - self.swapped / self.open_count if self.open_count else 1.0

    def _swap(self, closing: Tensor, opening: Tensor, generation: int) -> None:
        """Close and open `closing` and `opening` [S] weights of each segment by saliency, then reset the saliency."""
        self.selections += 1
        fragments = self._fragments()
        parts = [Part(self._keys(shard, f), shard.opened[f.here], f.index) for shard, f in fragments]
        slots = torch.arange(len(self.sizes))
        segments = slots if self.settings.scope == "matrix" else torch.zeros_like(slots)
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
        """How many weights are open after `build`."""
        return int(self._keep_counts().sum())

    def _fragments(self) -> list[tuple[Shard, Fragment]]:
        return [(shard, fragment) for shard in self.shards for fragment in shard.fragments]

    def _keys(self, shard: Shard, f: Fragment) -> Callable[[slice], Tensor]:
        """A function from a slice of the fragment to its sort keys."""
        if self.settings.saliency == "random":
            rng = torch.Generator().manual_seed(derived_seed(self.settings.seed, self.concept, self.selections, f.name))
            whole = torch.rand(self.sizes[f.name], generator=rng)  # drawn for the whole matrix: any rank count agrees
            # A copy of this rank's slice, so that the whole matrix can be freed.
            collected = whole[f.start : f.start + f.numel].to(shard.saliency.device, copy=True)
        else:
            collected = shard.saliency[f.here]
        return lambda here: sort_keys(collected[here])

    def _segment_sizes(self) -> Tensor:  # int64 [S]
        sizes = torch.tensor(list(self.sizes.values()))
        return sizes if self.settings.scope == "matrix" else sizes.sum().view(1)

    def _keep_counts(self) -> Tensor:  # int64 [S]
        return torch.tensor([int(self.settings.keep * int(n)) for n in self._segment_sizes()])
