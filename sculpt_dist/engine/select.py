"""Exact selection of the k largest keys per segment over sharded tensors, by all-reduced digit counts.

A radix descent: for each of four 8-bit digits, every rank counts its candidates by digit, the counts [segments, 256] are summed
over ranks, and the digit in which the k-th largest lies is fixed. No sort, no full-size copy on any rank, and a payload that
does not depend on the number of weights. Ties at the last value go to the smallest positions, so that the choice does not
depend on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor

from sculpt_dist.engine.group import Group

DIGIT_BITS = 8
BINS = 1 << DIGIT_BITS
LARGEST_KEY = 0x7FFFFFFF


@dataclass(frozen=True)
class Candidates:
    """Keys of one fragment: int32 [n], larger is better, -1 is no candidate.

    `slot` numbers the parameters by position, so that the slots of a segment are consecutive; the fragments of one parameter lie
    on the ranks in order.
    """

    keys: Tensor
    slot: int


def choose_largest(parts: Sequence[Candidates], segments: Tensor, counts: Tensor, group: Group | None) -> list[Tensor]:
    """For each part a bool mask [n] of what is chosen: exactly counts[s] in segment s over all ranks.

    `segments` int64 [slots] is the segment of each slot; `counts` int64 [S] is at most the number of candidates of each. `group` is
    None where every rank holds everything.
    """
    of = [int(segments[part.slot]) for part in parts]
    threshold, needed = _descend(parts, of, counts, group)
    before = _ties_before(parts, of, segments, threshold, group)
    masks = []
    for part, s, earlier in zip(parts, of, before):
        if counts[s] == 0:
            masks.append(torch.zeros_like(part.keys, dtype=torch.bool))
            continue
        tied = part.keys == threshold[s]
        masks.append((part.keys > threshold[s]) | (tied & (tied.cumsum(0) <= int(needed[s]) - earlier)))
    return masks


def kth_largest(keys: Sequence[Tensor], counts: Tensor, group: Group | None) -> Tensor:
    """For each k of `counts` int64 [Q] the k-th largest key [Q] of all ranks, 1 being the largest; `keys` int32 [n] each.

    Two counts, of the upper half of the bits and then of the lower half where the upper one fits: one pass over all keys and a short
    one for each k.
    """
    upper = torch.zeros(1, 1 << 15, dtype=torch.int64)
    for part in keys:
        upper[0] += torch.bincount(part >> 16, minlength=1 << 15).cpu()
    high, needed = _find(_summed(upper, group), counts)
    lower = torch.zeros(len(counts), 1 << 16, dtype=torch.int64)
    for part in keys:
        halves = part >> 16
        for q, half in enumerate(high.tolist()):
            lower[q] += torch.bincount(part[halves == half] & 0xFFFF, minlength=1 << 16).cpu()
    low, _ = _find(_summed(lower, group), needed)
    return (high << 16) | low


def _find(histogram: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The bin [Q] that holds the k-th largest of each row [Q or 1, bins], and which one within its bin that is [Q]."""
    above = histogram.flip(1).cumsum(1).flip(1) - histogram  # in larger bins
    found = ((above < counts[:, None]) & (above + histogram >= counts[:, None])).long().argmax(1)
    return found, counts - above.expand(len(counts), -1).gather(1, found[:, None])[:, 0]


def _summed(histogram: Tensor, group: Group | None) -> Tensor:
    return histogram if group is None else group.sum(histogram.to(group.device)).cpu()


def _descend(parts: Sequence[Candidates], of: Sequence[int], counts: Tensor, group: Group | None) -> tuple[Tensor, Tensor]:
    """The k-th largest key of each segment [S], and how many of the keys equal to it are needed [S]."""
    prefix = torch.zeros_like(counts)
    needed = counts.clone()
    for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
        histogram = torch.zeros(len(counts), BINS, dtype=torch.int64)
        for part, s in zip(parts, of):
            inside = part.keys[(part.keys >= 0) & ((part.keys >> shift >> DIGIT_BITS) == prefix[s])]
            histogram[s] += torch.bincount((inside >> shift) & (BINS - 1), minlength=BINS).cpu()
        if group is not None:
            histogram = group.sum(histogram.to(group.device)).cpu()
        above = histogram.flip(1).cumsum(1).flip(1) - histogram  # candidates in larger digits
        holds = (above < needed[:, None]) & (above + histogram >= needed[:, None])
        assert bool((holds.any(1) | (needed == 0)).all()), "more weights asked for than there are candidates"
        digit = holds.long().argmax(1)
        needed = needed - above.gather(1, digit[:, None])[:, 0] * (counts > 0)
        prefix = (prefix << DIGIT_BITS) | digit
    return prefix, needed


def _ties_before(parts: Sequence[Candidates], of: Sequence[int], segments: Tensor, threshold: Tensor, group: Group | None) -> list[int]:
    """For each part, how many keys equal to the threshold lie at smaller positions of its segment, over all ranks."""
    rank, size = (group.rank, group.size) if group is not None else (0, 1)
    ties = torch.zeros(len(segments), size, dtype=torch.int64)
    for part, s in zip(parts, of):
        ties[part.slot, rank] += int((part.keys == threshold[s]).sum())
    if group is not None:
        ties = group.sum(ties.to(group.device)).cpu()
    earlier = (ties.view(-1).cumsum(0) - ties.view(-1)).view_as(ties)  # over all slots and ranks
    first_slot = torch.searchsorted(segments, segments)  # the segments ascend, so this is where each begins
    before = earlier - earlier[first_slot, 0][:, None]
    return [int(before[part.slot, rank]) for part in parts]
