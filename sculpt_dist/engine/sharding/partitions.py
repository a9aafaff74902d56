"""Finds this rank's shards inside DeepSpeed's ZeRO optimizers (deepspeed 0.19.8)."""

from __future__ import annotations

from typing import Any

from sculpt_dist.engine.sharding.shards import Fragment, Shard


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
