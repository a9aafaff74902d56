"""Exact selection of the weights that a mask closes and opens: a radix selection over sharded saliency.

Each segment (one matrix, or all of them) needs two selections: the n least salient open weights, to close, and the m
most salient closed ones, to open. One integer orders all weights: the bits of |saliency|, which sort like the number,
minus 2^31 if the weight is open. Then the n smallest close and the m largest open. The two thresholds are found digit
by digit: the first digit is counted over all weights, each further digit only over the weights that share the digits
found so far, a few per cent. Counts are summed over ranks, so the payload does not depend on the number of weights.
Weights are processed in chunks: no sort, no index tensors, no copy of the saliency. Ties at a threshold go to the
lowest positions, so the choice does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt_dist.core.errors import NonFiniteError
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.sharding.shards import spans

BITS = (11, 7, 7, 6)  # digits of a key's 31 bits; the first has the exponent and three bits of the mantissa
FIRST = 31 - BITS[0]  # bits below the first digit
BINS = 1 << BITS[0]
NON_FINITE = 0x7F800000 >> FIRST  # the first digit of infinity and NaN
CLOSING, OPENING = 0, 1  # selected from below, from above
SIDES = (CLOSING, OPENING)


@dataclass(frozen=True)
class Part:
    """The weights of one fragment. `keys` maps a slice to int32 sort keys >= 0; `opened` uint8 [n] is 0 where closed.

    `slot` numbers the parameters by position, so that the slots of a segment are consecutive; the fragments of one
    parameter are in rank order, at most one per rank.
    """

    keys: Callable[[slice], Tensor]
    opened: Tensor
    slot: int

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(slice, the int32 numbers that order its weights), over all weights."""
        for here in spans(0, len(self.opened), self.opened.device):
            yield here, self.keys(here).sub_(self.opened[here].clamp(max=1), alpha=1 << 31)


@dataclass(frozen=True)
class Cut:
    """The selection in one part: numbers below ends[CLOSING] close and those above ends[OPENING] open.

    Of the weights equal to an end, the first `ties` are selected as well.
    """

    ends: list[int]
    ties: list[int]


@dataclass(frozen=True)
class Choice:
    """The selection in every part, and how the saliency is distributed."""

    cuts: list[Cut]  # one per part
    histogram: Tensor  # int64 [BINS]: weights of all ranks by the first digit of their key


def choose(parts: Sequence[Part], segments: Tensor, closing: Tensor, opening: Tensor, group: Group | None) -> Choice:
    """Select exactly closing[s] of the open and opening[s] of the closed weights of segment s, over all ranks.

    `segments` int64 [slots] gives the segment of each slot, ascending; `closing`, `opening` int64 [S] must not exceed
    the number of candidates. `group` is None when every rank holds everything. Raises NonFiniteError, on all ranks,
    when a saliency is not finite.
    """
    of = [int(segments[part.slot]) for part in parts]
    counts = _summed(_count_first(parts, of, len(closing)), group)  # [S, 2 BINS], open ones first
    halves = counts.view(-1, 2, BINS)
    if bool(halves[:, :, NON_FINITE:].any()):
        raise NonFiniteError(
            "the collected gradients are not finite, so no mask can be made; check the data of this concept"
        )
    wanted = torch.stack([closing, opening])  # [2, S]
    assert bool((wanted <= halves.sum(2).T).all()), "more weights wanted than there are candidates"
    places, needed = zip(*(_end(counts, wanted[side], side) for side in SIDES))
    ends = [place - BINS for place in places]  # first digits of the ordering numbers; negative for open weights
    inside = [_within(part, [int(ends[side][s]) for side in SIDES]) for part, s in zip(parts, of)]
    left = FIRST
    for bits in BITS[1:]:
        left -= bits
        for side in SIDES:
            digits = torch.zeros(len(closing), 1 << bits, dtype=torch.int64)
            for numbers, s in zip(inside, of):
                fits = numbers[side][(numbers[side] >> left >> bits) == ends[side][s]]
                digits[s] += torch.bincount((fits >> left) & ((1 << bits) - 1), minlength=1 << bits).cpu()
            digit, rest = _end(_summed(digits, group), needed[side], side)
            ends[side] = (ends[side] << bits) | digit
            needed = (rest, needed[1]) if side == CLOSING else (needed[0], rest)
    nothing = (-(1 << 31), 0x7FFFFFFF)  # ends that select no weight
    ends = [torch.where(wanted[side] > 0, ends[side], nothing[side]) for side in SIDES]
    ties = []
    for side in SIDES:
        tied = [int((numbers[side] == ends[side][s]).sum()) for numbers, s in zip(inside, of)]
        before = _before(tied, parts, segments, group)
        ties.append([min(have, max(0, int(needed[side][s]) - earlier)) for have, earlier, s in zip(tied, before, of)])
    cuts = [Cut([int(ends[side][s]) for side in SIDES], [ties[side][i] for side in SIDES]) for i, s in enumerate(of)]
    return Choice(cuts, halves.sum((0, 1)))


def chosen(part: Part, cut: Cut) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunk by chunk, (slice, which close, which open) as uint8 0 or 1.

    The caller may change a chunk's `opened` once that chunk was yielded.
    """
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
    """A comparison as uint8 0 or 1, through int32: torch vectorises that on a CPU, three times as fast as bool."""
    return relation(numbers, value, out=torch.empty_like(numbers)).to(torch.uint8)


def quantiles(histogram: Tensor, shares: Sequence[float]) -> dict[float, float]:
    """The |saliency| at each share of all weights, from a choice's histogram; at most an eighth too low."""
    upto = histogram.cumsum(0)
    ranks = [int(share * (int(upto[-1]) - 1)) for share in shares]
    digits = torch.tensor([int(torch.searchsorted(upto, rank, right=True)) for rank in ranks])
    return dict(zip(shares, (digits << FIRST).to(torch.int32).view(torch.float32).tolist()))


def payload_bytes(segments: int, slots: int, ranks: int) -> int:
    """Bytes that one `choose` sums over `ranks` ranks, for `segments` segments with `slots` parameters in all."""
    counts = segments * (2 * BINS + len(SIDES) * sum(1 << bits for bits in BITS[1:]))
    return counts * (4 if segments > 1 else 8) + len(SIDES) * slots * ranks * 8


def _count_first(parts: Sequence[Part], of: Sequence[int], segments: int) -> Tensor:  # int64 [S, 2 BINS]
    counts = torch.zeros(segments, 2 * BINS, dtype=torch.int64)
    for part, s in zip(parts, of):
        for _, numbers in part.chunks():
            counts[s] += torch.bincount((numbers >> FIRST).add_(BINS), minlength=2 * BINS).cpu()
    return counts


def _within(part: Part, digits: Sequence[int]) -> list[Tensor]:
    """For each side, the numbers [n] with its first digit."""
    found: list[Tensor] = []
    for _, numbers in part.chunks():
        first = numbers >> FIRST
        fits = compared(torch.eq, first, digits[CLOSING]) | compared(torch.eq, first, digits[OPENING])
        found.append(numbers.masked_select(fits.view(torch.bool)))
    both = torch.cat(found)
    return [both[(both >> FIRST) == digit] for digit in digits]


def _end(counts: Tensor, needed: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """For each row of `counts` [S, bins], the bin that holds its needed[s]-th weight, and the rank within that bin.

    Weights are counted from below to close, from above to open.
    """
    # past: weights in the bins that come before
    past = counts.cumsum(1) - counts if side == CLOSING else counts.flip(1).cumsum(1).flip(1) - counts
    place = ((past < needed[:, None]) & (past + counts >= needed[:, None])).long().argmax(1)
    return place, (needed - past.gather(1, place[:, None])[:, 0]) * (needed > 0)


def _summed(counts: Tensor, group: Group | None) -> Tensor:
    """The sum over ranks. In int32 when there are several segments: each of them then has fewer than 2^31 weights."""
    if group is None:
        return counts
    return group.sum(counts.to(group.device, torch.int32 if len(counts) > 1 else torch.int64)).cpu().long()


def _before(ties: Sequence[int], parts: Sequence[Part], segments: Tensor, group: Group | None) -> list[int]:
    """For each part, the number of ties at lower positions of its segment, over all ranks."""
    rank, size = (group.rank, group.size) if group is not None else (0, 1)
    table = torch.zeros(len(segments), size, dtype=torch.int64)
    for part, count in zip(parts, ties):
        table[part.slot, rank] += count
    if group is not None:
        table = group.sum(table.to(group.device)).cpu()
    earlier = (table.view(-1).cumsum(0) - table.view(-1)).view_as(table)  # over all slots and ranks
    first_slot = torch.searchsorted(segments, segments)  # segments ascend, so this is where each begins
    before = earlier - earlier[first_slot, 0][:, None]
    return [int(before[part.slot, rank]) for part in parts]
