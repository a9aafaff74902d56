"""Finds this rank's shards inside DeepSpeed's ZeRO optimizers (deepspeed 0.19.8)."""

from __future__ import annotations

from typing import Any

from sculpt_dist.engine.sharding.shards import Fragment, Shard


def find_shards(engine: Any, stage: int, packed: bool = False) -> list[Shard]:
    """Map the flat tensors that DeepSpeed's base optimizer steps back to parameters and slices, for every stage.

    Stages 1 and 2 record the mapping in each parameter's `_hp_mapping`, stage 3 in `grad_position` and the partition
    number; stage 0 steps the parameters themselves. In a sharded stage the ranks together hold every trainable element
    exactly once, which `check_coverage` asserts.
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
        elif p._hp_mapping is None:  # this rank holds nothing of it
            continue
        else:
            master, whole = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
            offset, start, numel = master.start, whole.start, master.numel
        if numel:
            fragments.append(Fragment(name, i, int(start), int(offset), int(numel)))
    return [Shard(masters[0], fragments, packed)]


def parameter_sizes(engine: Any) -> dict[str, int]:
    """Number of elements of each trainable parameter, unsharded, in the order of the net."""
    named = engine.module.named_parameters()
    return {name: int(getattr(p, "ds_numel", p.numel())) for name, p in named if p.requires_grad}


def check_coverage(shards: list[Shard], sizes: dict[str, int], total_over_ranks: int) -> None:
    """Assert that the fragments of all ranks together have as many elements as the trainable parameters."""
    total = sum(sizes.values())
    assert total_over_ranks == total, f"shards hold {total_over_ranks} of {total} trainable elements"
    for shard in shards:
        for f in shard.fragments:
            assert f.start + f.numel <= sizes[f.name], f"{f.name}: a fragment ends past the parameter"
