"""A step without values: a function runs on the meta device, and every tensor that it makes is counted while alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from sculpt_dist.core.types import Losses
from sculpt_dist.maths.planning import Moment, Rehearsed

DEVICES_OWN = functional.scaled_dot_product_attention
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FLOPS: dict[Any, Callable[..., int]] = flop_registry | {
    ATTENTION: lambda query, key, value, *_, **__: sdpa_flop_count(query.shape, key.shape, value.shape),
    ATTENTION_BACKWARD: lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(
        grad.shape, query.shape, key.shape, value.shape
    ),
}


class Living(TorchDispatchMode):
    """Counts the bytes of storages that operations make, while anything refers to them, and the operations' FLOPs.

    Storages of the `existing` tensors do not count. Torch's FlopCounterMode is unsuitable: it keeps tensors alive that
    a backward recomputes.
    """

    def __init__(self, existing: Sequence[Tensor]) -> None:
        super().__init__()
        self.bytes, self.flops, self._most = 0, 0, 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in existing}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        made = operation(*arguments, **options)
        counts = FLOPS.get(operation.overloadpacket)
        if counts is not None:
            self.flops += counts(*arguments, **options, out_val=made)
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return made

    def most(self) -> int:
        """The peak of living bytes since the previous call."""
        most, self._most = self._most, self.bytes
        return most

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            self._most = max(self._most, self.bytes)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Use fused attention, as devices do: it keeps the result and a row of sums. The meta device keeps all scores.

    This replaces the function itself, because torch disables its function modes while a backward recomputes
    activations.
    """
    replacement: Any = _fused
    functional.scaled_dot_product_attention = replacement
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = DEVICES_OWN


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> Tensor:
    mask = attn_mask.to(query.dtype) if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
    return ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=mask)[0]


def rehearse(function: Callable[[], Losses], net: nn.Module) -> Rehearsed:
    """The losses of one micro-batch and their backward; gradients are dropped as they arrive.

    `net` and the inputs of `function` are on the meta device. Workspace of kernels is not counted.
    """
    moments: list[Moment] = []
    forwards: list[bool] = []
    whole = {parameter.untyped_storage()._cdata: parameter.numel() for parameter in net.parameters()}
    viewed: dict[int, int] = {}
    training = [parameter for parameter in net.parameters() if parameter.requires_grad]
    with fused_attention(), Living([*net.parameters(), *net.buffers()]) as living:

        def arrive(parameter: Tensor) -> None:
            parameter.grad = None
            moments.append(Moment(living.most() - parameter.numel() * parameter.element_size(), parameter.numel()))

        def pack(tensor: Tensor) -> Tensor:
            size = whole.get(tensor.untyped_storage()._cdata)
            if size is not None and tensor._base is not None:
                viewed[tensor.untyped_storage()._cdata] = size
            return tensor.detach()  # as an output it would refer to itself

        hooks = [parameter.register_post_accumulate_grad_hook(arrive) for parameter in training]
        hooks.append(net.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled())))
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            total = function().total
        forward, of_forward = living.most(), living.flops
        total.backward()
        del total
        moments.append(Moment(living.most(), 0))
    for hook in hooks:
        hook.remove()
    return Rehearsed(
        forward, tuple(moments), of_forward, living.flops - of_forward, tuple(forwards), sum(viewed.values())
    )


@dataclass(frozen=True)
class Counted:
    """What a function without gradient needs: the peak of living bytes, and operations."""

    bytes: int
    flops: int


def counted(function: Callable[[], object], net: nn.Module) -> Counted:
    """Run `function` without gradient; the weights of `net`, on the meta device, do not count."""
    with torch.no_grad(), fused_attention(), Living([*net.parameters(), *net.buffers()]) as living:
        function()
        return Counted(living.most(), living.flops)
