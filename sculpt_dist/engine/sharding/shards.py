"""The flat fp32 tensors that this rank's optimizer steps, and which parameter slices they hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt_dist.engine.sharding.moments import Moments

CHUNK = 1 << 18  # weights that a CPU processes at a time, so that they stay in its cache


@dataclass(frozen=True)
class Fragment:
    """`master[offset : offset + numel]` is `parameter.view(-1)[start : start + numel]`."""

    name: str
    index: int  # of the parameter among the trainable ones
    start: int
    offset: int
    numel: int

    @property
    def here(self) -> slice:
        """Its slice of the flat shard."""
        return slice(self.offset, self.offset + self.numel)


def spans(first: int, last: int, device: torch.device) -> list[slice]:
    """Slices that cover the weights first .. last - 1, each processed in one go: chunks on a CPU, one on a GPU."""
    size = CHUNK if device.type == "cpu" else max(1, last - first)
    return [slice(at, min(at + size, last)) for at in range(first, last, size)]


class Shard:
    """One flat fp32 tensor [n] that this rank steps, with the state kept for each weight."""

    def __init__(self, master: Tensor, fragments: list[Fragment], packed: bool = False) -> None:
        """`packed`: hold moments for open weights only."""
        self.master = master  # what the base optimizer sees; its .grad is the reduced gradient
        self.fragments = sorted(fragments, key=lambda f: f.offset)
        n, device = master.numel(), master.device
        self.saliency = torch.zeros(n, dtype=torch.float32, device=device)  # signed for abs_sum
        self.opened = torch.ones(n, dtype=torch.uint8, device=device)  # 0 closed, g > 0 open since generation g
        self.spans = [span for f in self.fragments for span in spans(f.offset, f.offset + f.numel, device)]
        self.moments = Moments(self.spans, n, device, packed)
        covered = torch.zeros(n, dtype=torch.bool, device=device)
        for fragment in self.fragments:
            assert not covered[fragment.here].any(), f"{fragment.name}: two fragments overlap"
            covered[fragment.here] = True
        self.padding = ~covered if not covered.all() else None

    @property
    def flat(self) -> Tensor:  # [n], a view
        return self.master.data.view(-1)

    def gradient(self) -> Tensor:
        """The reduced, averaged, unclipped gradient of this step, [n]."""
        assert self.master.grad is not None, "the optimizer was stepped without a gradient"
        return self.master.grad.view(-1)
