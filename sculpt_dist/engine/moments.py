"""Adam's two moments of a shard's weights: of all of them, or of the open ones alone."""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch
from torch import Tensor

PADDING = 16  # numbers beyond the last one, which a kernel may read
ROUNDING = 1 << 12  # a piece has room for a multiple of so many, so that it seldom needs another place when its count changes


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
        self._numbers = {span.start: number for number, span in enumerate(self.spans)}
        self._pieces: list[Piece] = []
        if not packed:
            self.momentum, self.variance = (torch.zeros(n, device=device) for _ in range(2))
            self._pieces = [Piece(span, self.momentum[span], self.variance[span]) for span in self.spans]

    def pieces(self, opened: Tensor) -> list[Piece]:
        """All of them; `opened` [n] says how many weights of each are open."""
        if not self._pieces:
            self._pieces = [Piece(span, *self._room(int((opened[span] > 0).sum()))) for span in self.spans]
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
        now = opened > 0
        was, count, renewed = now ^ swapped.bool(), int(now.sum()), []
        for moment in moments:
            kept = unpacked(moment, was)[now]
            room = moment if len(moment) >= count + PADDING else self._room(count)[0]
            room[:count] = kept
            renewed.append(room)
        self._pieces[number] = Piece(where, *renewed)

    def flat(self, opened: Tensor) -> tuple[Tensor, Tensor]:
        """Both of all weights, [n] each: themselves, or where they are packed a copy."""
        if not self.packed:
            return self.momentum, self.variance
        both = torch.zeros(self._n, device=self._device), torch.zeros(self._n, device=self._device)
        for piece in self._pieces:
            for whole, moment in zip(both, piece[1:]):
                whole[piece.where] = unpacked(moment, opened[piece.where] > 0)
        return both

    def fill(self, momentum: Tensor, variance: Tensor, opened: Tensor) -> None:
        """Take over both from those of all weights, [n] each."""
        if not self.packed:
            self.momentum.copy_(momentum)
            self.variance.copy_(variance)
            return
        self._pieces = []
        if momentum.any() or variance.any():
            for piece in self.pieces(opened):
                for whole, moment in zip((momentum, variance), piece[1:]):
                    kept = whole[piece.where][opened[piece.where] > 0]
                    moment[: len(kept)] = kept

    def _room(self, count: int) -> tuple[Tensor, Tensor]:
        size = (count + ROUNDING - 1) // ROUNDING * ROUNDING + PADDING
        return torch.zeros(size, device=self._device), torch.zeros(size, device=self._device)


def unpacked(moment: Tensor, is_open: Tensor) -> Tensor:
    """[n] from those of the open weights; 0 where closed."""
    return torch.zeros(len(is_open), device=moment.device).masked_scatter_(is_open, moment)
