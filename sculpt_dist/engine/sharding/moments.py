"""Adam's two moments of a shard's weights: of all of them, or of the open ones alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PADDING = 16  # numbers beyond the last one, which a kernel may read
ROUNDING = (
    1 << 12
)  # a piece has room for a multiple of so many, so that it seldom needs another place when its count changes

Repack = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class Piece(NamedTuple):
    """The moments of the weights `where` of a shard: of all of them, or packed, of the open ones in their order."""

    where: slice
    momentum: Tensor
    variance: Tensor


class Moments:
    """Held piece by piece. Packed ones take their memory with the first update: collecting needs none."""

    def __init__(self, spans: Sequence[slice], n: int, device: torch.device, packed: bool) -> None:
        """`spans`: where the pieces lie; what is outside of them never moves."""
        self.spans, self.packed = list(spans), packed
        self._n, self._device = n, device
        self.repack: Repack = repack  # or a faster one
        self._spare = torch.zeros(0, device=device)  # the place of the piece that was renewed last
        self._numbers = {span.start: number for number, span in enumerate(self.spans)}
        self._pieces: list[Piece] = []
        if not packed:
            self.momentum, self.variance = (torch.zeros(n, device=device) for _ in range(2))
            self._pieces = [Piece(span, self.momentum[span], self.variance[span]) for span in self.spans]

    def pieces(self, opened: Tensor) -> list[Piece]:
        """All of them; `opened` [n] says how many weights of each are open."""
        if not self._pieces:
            self._pieces = [Piece(span, self._room(opened[span]), self._room(opened[span])) for span in self.spans]
        return self._pieces

    def reset(self) -> None:
        """All zero."""
        if self.packed:
            self._pieces = []
        else:
            self.momentum.zero_()
            self.variance.zero_()

    def reopen(self, start: int, swapped: Tensor, opened: Tensor) -> None:
        """Zero for the weights that were just opened or closed: uint8 1 in `swapped`; `opened` is how they are now. Of the piece at `start`."""
        if not self._pieces:
            return
        number = self._numbers[start]
        where, *moments = self._pieces[number]
        if not self.packed:
            stays = swapped.to(torch.int32) - 1  # all bits, or none
            for moment in moments:
                moment.view(torch.int32).bitwise_and_(stays)
            return
        count, renewed = int(torch.count_nonzero(opened)), []
        for moment in moments:
            fits = 0 <= len(self._spare) - count - PADDING < 2 * ROUNDING
            room = self._spare if fits else self._room(opened)
            self.repack(swapped, opened, moment, room)
            renewed.append(room)
            self._spare = moment
        self._pieces[number] = Piece(where, *renewed)

    def flat(self, opened: Tensor) -> tuple[Tensor, Tensor]:
        """Both of all weights, [n] each: themselves, or where they are packed a copy."""
        if not self.packed:
            return self.momentum, self.variance
        both = torch.zeros(self._n, device=self._device), torch.zeros(self._n, device=self._device)
        for where, *moments in self._pieces:
            ranks = ranks_among_open(opened[where])
            for whole, moment in zip(both, moments):
                whole[where] = unpacked(moment, ranks, opened[where])
        return both

    def fill(self, momentum: Tensor, variance: Tensor, opened: Tensor) -> None:
        """Take over both from those of all weights, [n] each."""
        if not self.packed:
            self.momentum.copy_(momentum)
            self.variance.copy_(variance)
            return
        self._pieces = []
        if momentum.any() or variance.any():
            for where, *moments in self.pieces(opened):
                ranks = ranks_among_open(opened[where])
                for whole, moment in zip((momentum, variance), moments):
                    pack(whole[where], ranks, opened[where], moment)

    def _room(self, opened: Tensor) -> Tensor:
        count = int(torch.count_nonzero(opened))
        return torch.zeros((count + ROUNDING - 1) // ROUNDING * ROUNDING + PADDING, device=self._device)


def repack(swapped: Tensor, opened: Tensor, moment: Tensor, room: Tensor) -> None:
    """A packed moment into `room`, after the weights `swapped` were opened and closed; `opened` is how they are now."""
    was = opened.clamp(max=1) ^ swapped
    pack(unpacked(moment, ranks_among_open(was), was), ranks_among_open(opened), opened, room)


def zero_where_closed(values: Tensor, opened: Tensor) -> Tensor:
    """Of four bytes a weight, in place; by bits, which a CPU does several times as fast as by a comparison."""
    values.view(torch.int32).bitwise_and_(opened.clamp(max=1).to(torch.int32).neg_())  # all bits, or none
    return values


def ranks_among_open(opened: Tensor) -> Tensor:
    """int32 [n]: how many open weights there are up to each, itself included. The packed number of an open one is at its rank - 1."""
    return opened.clamp(max=1).cumsum(0, dtype=torch.int32)


def unpacked(moment: Tensor, ranks: Tensor, opened: Tensor) -> Tensor:
    """[n] from those of the open weights; 0 where closed. By ranks, as torch's masked_scatter takes three times as long."""
    return zero_where_closed(moment.index_select(0, (ranks - 1).clamp_(min=0)), opened)


def pack(values: Tensor, ranks: Tensor, opened: Tensor, room: Tensor) -> None:
    """The inverse: the values of the open weights into `room`. The closed ones go behind them in a scratch of [n], each to a place of its
    own: to one place all would wait for each other."""
    count = int(ranks[-1]) if len(ranks) else 0
    numbers = torch.arange(1, len(ranks) + 1, dtype=torch.int32, device=ranks.device)
    places = zero_where_closed(ranks * 2 - numbers - count, opened).add_(numbers - ranks + count - 1)  # open: rank - 1
    room[:count] = torch.empty_like(values).index_copy_(0, places.long(), values)[:count]
