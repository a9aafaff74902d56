"""The whole net of a stage 3 run, for drawing images: gathered once, and not again in every forward of the sampler."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sculpt_dist.engine.group import Group

ROOM = 1.5  # the memory that must be free, in whole nets: one, and what drawing takes


def gathered_net(sharded: nn.Module, empty: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """A plain net with the present weights of a net under stage 3. All ranks enter.

    `empty` builds a net with the same names; its weights are replaced one after another.
    """
    import deepspeed
    from accelerate import init_empty_weights  # type: ignore[import-untyped]  # ships no types

    with init_empty_weights(include_buffers=False):
        net = empty()
    for name, parameter in sharded.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            whole = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        module, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(module), leaf, whole)
    for name, buffer in sharded.named_buffers():  # rounded as the engine has rounded them
        module, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(module), leaf, buffer.clone())
    return net.to(device).eval()


def fits(sharded: nn.Module, group: Group) -> bool:
    """Whether the whole net has room beside its shards, on every rank."""
    needed = sum(_numel(parameter) * parameter.element_size() for parameter in sharded.parameters())
    lacking = torch.tensor([float(free_memory(group.device) < ROOM * needed)], device=group.device)
    return not bool(group.max(lacking).item())


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may still take: of its GPU, or its share of the machine's memory (Linux; 0 elsewhere)."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
