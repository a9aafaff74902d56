"""Where the weights live: the flat fp32 tensors that this rank's optimizer steps, and which slice of which matrix they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sculpt_dist.engine.moments import Moments

CHUNK = 1 << 18  # weights that a CPU works on together: they stay in its cache


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
        return slice(self.offset, self.offset + self.numel)


def spans(first: int, last: int, device: torch.device) -> list[slice]:
    """What is worked on together of the weights first .. last - 1: chunks on a CPU, all on a GPU."""
    size = CHUNK if device.type == "cpu" else max(1, last - first)
    return [slice(at, min(at + size, last)) for at in range(first, last, size)]


class Shard:
    """One flat fp32 tensor [n] that this rank steps, with all that is kept per weight beside it."""

    def __init__(self, master: Tensor, fragments: list[Fragment], packed: bool = False) -> None:
        """`packed`: moments are held for open weights only."""
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


def find_shards(engine: Any, stage: int, packed: bool = False) -> list[Shard]:
    """Map what DeepSpeed's base optimizer steps back to (name, slice), for every stage (deepspeed 0.19.8).

    Stages 1 and 2 say it in `_hp_mapping` of each parameter, stage 3 in `grad_position` and the partition number, and stage 0
    steps the parameters themselves. Every element of every trainable parameter is found exactly once over the ranks of a
    sharded stage, which `check_coverage` asserts.
    """
    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if stage == 0:
        return [Shard(p, [Fragment(name, i, 0, 0, p.numel())], packed) for i, (name, p) in enumerate(named)]
    zero = engine.optimizer
    masters = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    assert len(masters) == 1, f"expected one flat shard per rank, found {len(masters)}: sub_group_size is too small"
    fragments = []
    for i, (name, p) in enumerate(named):
        if stage == 3:
            _, offset, partition = zero.grad_position[zero.get_param_id(p)]
            start = zero._get_param_partition_rank(p) * partition
            numel = max(0, min(partition, p.ds_numel - start))  # the last rank's share ends in padding
        elif p._hp_mapping is None:  # nothing of it lives on this rank
            continue
        else:
            master, whole = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
            offset, start, numel = master.start, whole.start, master.numel
        if numel:
            fragments.append(Fragment(name, i, int(start), int(offset), int(numel)))
    return [Shard(masters[0], fragments, packed)]


def parameter_sizes(engine: Any) -> dict[str, int]:
    """Elements of each trainable parameter, whole, in the order of the net."""
    return {
        name: int(getattr(p, "ds_numel", p.numel())) for name, p in engine.module.named_parameters() if p.requires_grad
    }


def check_coverage(shards: list[Shard], sizes: dict[str, int], total_over_ranks: int) -> None:
    """Assert that the fragments of all ranks together are as many elements as the trainable parameters have."""
    assert total_over_ranks == sum(sizes.values()), (
        f"shards hold {total_over_ranks} of {sum(sizes.values())} trainable elements"
    )
    for shard in shards:
        for f in shard.fragments:
            assert f.start + f.numel <= sizes[f.name], f"{f.name}: fragment past its end"
