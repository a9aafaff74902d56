"""The outputs of one block of the denoiser while it draws images, as vectors with the time they belong to.

Letters in shapes: B images, N positions of a block's output, D its width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.config.schema import PrepareConfig
from sculpt_dist.core.files import derived_seed
from sculpt_dist.guards.parts.calls import time_of


def as_rows(output: Tensor) -> Tensor:
    """A block's output, [B, D, H, W] of a UNet or [B, N, D] of a DiT, as [B, N, D]."""
    return output.flatten(2).mT if output.ndim == 4 else output


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `as_rows`."""
    return (rows.mT.reshape(like.shape) if like.ndim == 4 else rows).to(like.dtype)


def drawn_activations(
    backbone: Backbone, block: nn.Module, prompts: Sequence[str], prepare: PrepareConfig, positions: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw images of the prompts in turn, `prepare.samples` of them; yields every batch's times [T] and [T, B, n, D].

    Of a block's positions `positions` are taken, others at every step, and only in the half of the prompt. Equal
    seeds give equal results.
    """
    rng = torch.Generator().manual_seed(derived_seed(seed, "activations", *prompts))
    times: list[float] = []
    kept: list[Tensor] = []

    def note(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        times.append(time_of(args, kwargs))

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        rows = as_rows(output if isinstance(output, Tensor) else output[0])
        rows = rows[len(rows) // 2 :]
        chosen = torch.randperm(rows.shape[1], generator=rng)[:positions].to(rows.device)
        kept.append(rows[:, chosen].float())

    texts = [prompts[i % len(prompts)] for i in range(prepare.samples)]
    hooks = [
        backbone.net.register_forward_pre_hook(note, with_kwargs=True),
        block.register_forward_hook(keep),
    ]
    try:
        for first in range(0, len(texts), prepare.batch):
            batch = texts[first : first + prepare.batch]
            noise = torch.randn(len(batch), *backbone.latent_shape, generator=rng).to(backbone.device)
            cond, negative = backbone.embed(batch), backbone.embed([""] * len(batch), negative=True)
            backbone.sample(backbone.denoiser(backbone.net), noise, cond, negative, prepare.steps, prepare.guidance)
            yield torch.tensor(times), torch.stack(kept)
            times.clear()
            kept.clear()
    finally:
        for hook in hooks:
            hook.remove()
