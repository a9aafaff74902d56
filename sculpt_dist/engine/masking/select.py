"""Exact choice of which weights a mask closes and opens, over sharded saliency, by all-reduced digit counts.

In every segment (a matrix, or all of them) two things are sought: the n least salient open weights, to close, and the m most salient
closed ones, to open. One number orders all weights: the bits of |saliency|, which sort like it, and 2^31 less where the weight is open;
then the n smallest close, and the m largest open. Where these ends lie is found digit by digit: the first digit is counted over all
weights, the further ones only over the weights that share the digits found so far, a few per cent. Counts are summed over ranks: a
payload that does not depend on the number of weights. The weights are gone through chunk by chunk: no sort, no index tensors, no copy
of the saliency. Ties at an end go to the smallest positions, so that the choice does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt_dist.core.errors import NonFiniteError
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.sharding.shards import spans

BITS = (11, 7, 7, 6)  # of the 31 of a number's size: the exponent and three bits of the mantissa first
FIRST = 31 - BITS[0]  # bits below the first digit
BINS = 1 << BITS[0]
NON_FINITE = 0x7F800000 >> FIRST  # first digit of infinity and of what is not a number
CLOSING, OPENING = 0, 1  # from below, from above
SIDES = (CLOSING, OPENING)


@dataclass(frozen=True)
class Part:
    """A fragment's weights. `keys` gives a slice of their int32 sort keys, not negative; `opened` uint8 [n] is 0 where closed.

    `slot` numbers the parameters by position, so that the slots of a segment are consecutive; the fragments of one parameter lie
    on the ranks in order, one on each.
    """

    keys: Callable[[slice], Tensor]
    opened: Tensor
    slot: int

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(where, the number that orders them, int32) of all weights."""
        for here in spans(0, len(self.opened), self.opened.device):
            yield here, self.keys(here).sub_(self.opened[here].clamp(max=1), alpha=1 << 31)


@dataclass(frozen=True)
class Cut:
    """What is chosen of one part: numbers below the first end close, above the second open, and so many ties at each, the first ones."""

    ends: list[int]
    ties: list[int]


@dataclass(frozen=True)
class Choice:
    cuts: list[Cut]  # for each part
    histogram: Tensor  # int64 [BINS], weights of all ranks by the first digit of their key


def choose(parts: Sequence[Part], segments: Tensor, closing: Tensor, opening: Tensor, group: Group | None) -> Choice:
    """Find exactly closing[s] of the open and opening[s] of the closed weights of segment s, over all ranks.

    `segments` int64 [slots] is the segment of each slot, ascending; `closing`, `opening` int64 [S] are at most what there is. `group`
    is None where every rank holds everything. Raises NonFiniteError, on all ranks, when a key is that of no finite number.
    """
    of = [int(segments[part.slot]) for part in parts]
    counts = _summed(_count_first(parts, of, len(closing)), group)  # [S, 2 BINS], open ones first
    halves = counts.view(-1, 2, BINS)
    if bool(halves[:, :, NON_FINITE:].any()):
        raise NonFiniteError(
            "the collected gradients are not finite, so no mask can be made; look at the data of this concept"
        )
    wanted = torch.stack([closing, opening])  # [2, S]
    assert bool((wanted <= halves.sum(2).T).all()), "more weights asked for than there are candidates"
    places, needed = zip(*(_end(counts, wanted[side], side) for side in SIDES))
    ends = [place - BINS for place in places]  # the numbers' first digits; open weights have negative ones
    inside = [_within(part, [int(ends[side][s]) for side in SIDES]) for part, s in zip(parts, of)]
    left = FIRST
    for bits in BITS[1:]:
        left -= bits
        for side in SIDES:
            mine = torch.zeros(len(closing), 1 << bits, dtype=torch.int64)
            for numbers, s in zip(inside, of):
                fits = numbers[side][(numbers[side] >> left >> bits) == ends[side][s]]
                mine[s] += torch.bincount((fits >> left) & ((1 << bits) - 1), minlength=1 << bits).cpu()
            digit, rest = _end(_summed(mine, group), needed[side], side)
            ends[side] = (ends[side] << bits) | digit
            needed = (rest, needed[1]) if side == CLOSING else (needed[0], rest)
    nothing = (-(1 << 31), 0x7FFFFFFF)  # below and above which there is none
    ends = [torch.where(wanted[side] > 0, ends[side], nothing[side]) for side in SIDES]
    ties = []
    for side in SIDES:
        held = [int((numbers[side] == ends[side][s]).sum()) for numbers, s in zip(inside, of)]
        before = _before(held, parts, segments, group)
        ties.append([min(have, max(0, int(needed[side][s]) - earlier)) for have, earlier, s in zip(held, before, of)])
    cuts = [Cut([int(ends[side][s]) for side in SIDES], [ties[side][i] for side in SIDES]) for i, s in enumerate(of)]
    return Choice(cuts, halves.sum((0, 1)))


def chosen(part: Part, cut: Cut) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(where, which close, which open), uint8 of 0 and 1, chunk by chunk. A chunk's `opened` may be changed when it was given."""
    left = list(cut.ties)
    for here, numbers in part.chunks():
        picked = [compared(torch.lt, numbers, cut.ends[CLOSING]), compared(torch.gt, numbers, cut.ends[OPENING])]
        for side in SIDES:
            if left[side]:
                tied = compared(torch.eq, numbers, cut.ends[side])
                count = int(tied.sum())
                if count > left[side]:
                    tied *= tied.cumsum(0) <= left[side]
                picked[side] |= tied
                left[side] -= min(count, left[side])
        yield here, picked[CLOSING], picked[OPENING]


def compared(relation: Callable[..., Tensor], numbers: Tensor, value: int) -> Tensor:
    """uint8 of 0 and 1. By way of int32, which torch vectorises on a CPU: three times as fast as a comparison that gives bool."""
    return relation(numbers, value, out=torch.empty_like(numbers)).to(torch.uint8)


def quantiles(histogram: Tensor, shares: Sequence[float]) -> dict[float, float]:
    """The |saliency| at each share of all weights, to the width of a first digit: at most an eighth below the true one.

    `histogram`: that of a choice.
    """
    upto = histogram.cumsum(0)
    ranks = [int(share * (int(upto[-1]) - 1)) for share in shares]
    digits = torch.tensor([int(torch.searchsorted(upto, rank, right=True)) for rank in ranks])
    return dict(zip(shares, (digits << FIRST).to(torch.int32).view(torch.float32).tolist()))


def payload_bytes(segments: int, slots: int, ranks: int) -> int:
    """Bytes that a choice sums over so many ranks: what `choose` counts of so many segments with `slots` parameters in all."""
    counts = segments * (2 * BINS + len(SIDES) * sum(1 << bits for bits in BITS[1:]))
    return counts * (4 if segments > 1 else 8) + len(SIDES) * slots * ranks * 8


def _count_first(parts: Sequence[Part], of: Sequence[int], segments: int) -> Tensor:  # int64 [S, 2 BINS]
    counts = torch.zeros(segments, 2 * BINS, dtype=torch.int64)
    for part, s in zip(parts, of):
        for _, numbers in part.chunks():
            counts[s] += torch.bincount((numbers >> FIRST).add_(BINS), minlength=2 * BINS).cpu()
    return counts


def _within(part: Part, digits: Sequence[int]) -> list[Tensor]:
    """The numbers [n] that have these first digits, for each side."""
    found: list[Tensor] = []
    for _, numbers in part.chunks():
        first = numbers >> FIRST
        fits = compared(torch.eq, first, digits[CLOSING]) | compared(torch.eq, first, digits[OPENING])
        found.append(numbers.masked_select(fits.view(torch.bool)))
    both = torch.cat(found)
    return [both[(both >> FIRST) == digit] for digit in digits]


def _end(counts: Tensor, needed: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The bin [S] in which the n-th weight of each row [S, bins] lies, from below to close and from above to open, and its number in it."""
    past = (
        counts.cumsum(1) - counts if side == CLOSING else counts.flip(1).cumsum(1).flip(1) - counts
    )  # in bins that come before
    place = ((past < needed[:, None]) & (past + counts >= needed[:, None])).long().argmax(1)
    return place, (needed - past.gather(1, place[:, None])[:, 0]) * (needed > 0)


def _summed(counts: Tensor, group: Group | None) -> Tensor:
    """Over ranks. As int32 where there are many segments: each has less than 2^31 weights then."""
    if group is None:
        return counts
    return group.sum(counts.to(group.device, torch.int32 if len(counts) > 1 else torch.int64)).cpu().long()


def _before(ties: Sequence[int], parts: Sequence[Part], segments: Tensor, group: Group | None) -> list[int]:
    """For each part, how many ties lie at smaller positions of its segment, over all ranks."""
    rank, size = (group.rank, group.size) if group is not None else (0, 1)
    table = torch.zeros(len(segments), size, dtype=torch.int64)
    for part, count in zip(parts, ties):
        table[part.slot, rank] += count
    if group is not None:
        table = group.sum(table.to(group.device)).cpu()
    earlier = (table.view(-1).cumsum(0) - table.view(-1)).view_as(table)  # over all slots and ranks
    first_slot = torch.searchsorted(segments, segments)  # the segments ascend, so this is where each begins
    before = earlier - earlier[first_slot, 0][:, None]
    return [int(before[part.slot, rank]) for part in parts]
