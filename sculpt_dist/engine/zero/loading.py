"""Builds a net for ZeRO stage 3 tensor by tensor, so that no rank ever holds all of it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from sculpt_dist.core.errors import ModelError
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.zero.settings import DTYPES, EngineSettings, deepspeed_config

TRIM_EVERY = 1 << 28  # bytes of loaded weights


def sharded_net(
    empty: Callable[[], nn.Module],
    stored: Iterable[tuple[str, Tensor]],
    group: Group,
    settings: EngineSettings,
    shapes: Mapping[str, tuple[int, ...]],
) -> nn.Module:
    """A net for stage 3: built without weights, then filled tensor by tensor, each partitioned over the ranks at once.

    `shapes` names the tensors that will arrive, in order; only rank 0 reads `stored`. No rank ever holds more than its
    share and one whole tensor. Raises ModelError, on all ranks, when the net and the stored tensors do not fit, or when
    weights are not finite.
    """
    import deepspeed
    from accelerate import init_empty_weights  # type: ignore[import-untyped]  # ships no types

    with init_empty_weights(include_buffers=False):
        net = empty()
    expected = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    check_fit(shapes, expected)
    dtype = DTYPES[settings.precision]
    partition = deepspeed.zero.Init(
        config_dict_or_path=deepspeed_config(settings, group.size), dtype=dtype, enabled=False
    )
    largest = max(math.prod(shape) for shape in expected.values())
    # One buffer for all tensors: separate allocations would fragment the heap.
    buffer = torch.empty(largest, dtype=dtype, device=group.device)
    source, broken, since_trim = iter(stored), [], 0
    for name, shape in shapes.items():
        tensor = next(source)[1] if group.is_first else None
        whole = buffer[: math.prod(shape)].view(shape)
        if tensor is not None:
            whole.copy_(tensor)
            if not torch.isfinite(whole).all():
                broken.append(name)
        parameter = nn.Parameter(whole, requires_grad=False)
        module, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(module), leaf, parameter)
        partition._convert_to_zero_parameters([parameter])  # broadcasts rank 0's values; each rank keeps its part
        del tensor
        since_trim += whole.nbytes
        if since_trim > TRIM_EVERY:
            return_free_memory()
            since_trim = 0
    broken = group.from_first(broken)
    if broken:
        raise ModelError(
            f"{len(broken)} weights of the net hold values that are not finite ({broken[0]}, ...); "
            "the checkpoint is damaged"
        )
    return net.eval()


def return_free_memory() -> None:
    """Return the heap's free pages to the system, if the C library can: loading tensor by tensor leaves many."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def check_fit(
    stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: object = "the net"
) -> None:
    """Raise ModelError when names or shapes of stored tensors differ from those of the net."""
    wrong = sorted(name for name in {*stored, *expected} if stored.get(name) != expected.get(name))
    if wrong:
        first = f"{wrong[0]}: stored {stored.get(wrong[0], 'none')}, config {expected.get(wrong[0], 'none')}"
        raise ModelError(
            f"{where}: {len(wrong)} weights do not fit config.json, first {first}; take both from one model"
        )
