"""Adam's two moments for a shard's weights: dense, for all weights, or packed, for the open ones only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PADDING = 16  # elements past the end that a kernel may read
ROUNDING = 1 << 12  # a piece's room is a multiple of this, so that a changed count seldom needs a new buffer

Repack = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class Piece(NamedTuple):
    """The moments of a shard's weights at `where`: dense for all of them, packed for the open ones in order."""

    where: slice
    momentum: Tensor
    variance: Tensor


class Moments:
    """Both moments of a shard, held piece by piece.

    The first update allocates packed moments: collecting needs none.
    """

    def __init__(self, spans: Sequence[slice], n: int, device: torch.device, packed: bool) -> None:
        """`spans` are the pieces' slices; weights outside of them never move."""
        self.spans, self.packed = list(spans), packed
        self._n, self._device = n, device
        self.repack: Repack = repack  # a kernel may install a faster one
        self._spare = torch.zeros(0, device=device)  # the old buffer of the piece that was repacked last
        self._numbers = {span.start: number for number, span in enumerate(self.spans)}
        self._pieces: list[Piece] = []
        if not packed:
            self.momentum, self.variance = (torch.zeros(n, device=device) for _ in range(2))
            self._pieces = [Piece(span, self.momentum[span], self.variance[span]) for span in self.spans]

    def pieces(self, opened: Tensor) -> list[Piece]:
        """All pieces, allocated now if they were not; `opened` [n] gives how many weights of each are open."""
        if not self._pieces:
            self._pieces = [Piece(span, self._room(opened[span]), self._room(opened[span])) for span in self.spans]
        return self._pieces

    def reset(self) -> None:
        """Set both moments to zero."""
        if self.packed:
            self._pieces = []
        else:
            self.momentum.zero_()
            self.variance.zero_()

    def reopen(self, start: int, swapped: Tensor, opened: Tensor) -> None:
        """In the piece at `start`, zero the moments of the weights that were just opened or closed.

        `swapped` is uint8 1 for those weights; `opened` is the new state.
        """
        if not self._pieces:
            return
        number = self._numbers[start]
        where, *moments = self._pieces[number]
        if not self.packed:
            stays = swapped.to(torch.int32) - 1  # all bits set, or none
            for moment in moments:
                moment.view(torch.int32).bitwise_and_(stays)
            return
        count, repacked = int(torch.count_nonzero(opened)), []
        for moment in moments:
            fits = 0 <= len(self._spare) - count - PADDING < 2 * ROUNDING
            room = self._spare if fits else self._room(opened)
            self.repack(swapped, opened, moment, room)
            repacked.append(room)
            self._spare = moment
        self._pieces[number] = Piece(where, *repacked)

    def flat(self, opened: Tensor) -> tuple[Tensor, Tensor]:
        """Both moments of all weights, [n] each: the tensors themselves when dense, unpacked copies when packed."""
        if not self.packed:
            return self.momentum, self.variance
        both = torch.zeros(self._n, device=self._device), torch.zeros(self._n, device=self._device)
        for where, *moments in self._pieces:
            ranks = ranks_among_open(opened[where])
            for whole, moment in zip(both, moments):
                whole[where] = unpacked(moment, ranks, opened[where])
        return both

    def fill(self, momentum: Tensor, variance: Tensor, opened: Tensor) -> None:
        """Take both moments from dense ones, [n] each."""
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
    """Pack a moment into `room` after the weights in `swapped` were opened or closed; `opened` is the new state."""
    was_open = opened.clamp(max=1) ^ swapped
    pack(unpacked(moment, ranks_among_open(was_open), was_open), ranks_among_open(opened), opened, room)


def zero_where_closed(values: Tensor, opened: Tensor) -> Tensor:
    """Zero four-byte values in place where closed. On a CPU, masking bits is several times faster than comparing."""
    values.view(torch.int32).bitwise_and_(opened.clamp(max=1).to(torch.int32).neg_())  # all bits set, or none
    return values


def ranks_among_open(opened: Tensor) -> Tensor:
    """int32 [n]: how many weights up to and including each are open. An open weight's packed index is its rank - 1."""
    return opened.clamp(max=1).cumsum(0, dtype=torch.int32)


def unpacked(moment: Tensor, ranks: Tensor, opened: Tensor) -> Tensor:
    """Dense values [n] from packed ones, 0 where closed. By rank: torch's masked_scatter takes three times as long."""
    return zero_where_closed(moment.index_select(0, (ranks - 1).clamp_(min=0)), opened)


def pack(values: Tensor, ranks: Tensor, opened: Tensor, room: Tensor) -> None:
    """Write the open weights' values [n] into `room`, in order: the inverse of `unpacked`.

    The closed ones go behind them in a scratch tensor [n], each to its own index: writes to a single index would
    serialise.
    """
    count = int(ranks[-1]) if len(ranks) else 0
    numbers = torch.arange(1, len(ranks) + 1, dtype=torch.int32, device=ranks.device)
    places = zero_where_closed(ranks * 2 - numbers - count, opened).add_(numbers - ranks + count - 1)  # open: rank - 1
    room[:count] = torch.empty_like(values).index_copy_(0, places.long(), values)[:count]
