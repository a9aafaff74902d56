"""What the keys and values of the cross-attention receive of a prompt, as rows for closed forms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sculpt_dist.backbones.base import Backbone


def received(backbone: Backbone, prompts: Sequence[str], negative: bool = False) -> Tensor:
    """One row per token that the cross-attention may attend to, [n, D]."""
    cond = backbone.embed(prompts, negative)
    rows = backbone.cross_attention_input(backbone.net, cond)  # [B, L, D]
    return rows.flatten(0, 1) if cond.token_mask is None else rows[cond.token_mask > 0]


def shared_rows(backbone: Backbone, old: str, new: str) -> tuple[Tensor, Tensor]:
    """The rows [n, D] of two prompts at the tokens that they share: at the beginning, at the end, and the padding."""
    ids, others = backbone.token_ids(old), backbone.token_ids(new)
    first = _common(ids, others)
    last = min(_common(ids[::-1], others[::-1]), min(len(ids), len(others)) - first)
    rows, counterparts = received(backbone, [old]), received(backbone, [new])
    padding = min(len(rows) - len(ids), len(counterparts) - len(others))

    def shared(tokens: Tensor, length: int) -> Tensor:
        return torch.cat([tokens[:first], tokens[length - last : length + padding]])

    return shared(rows, len(ids)), shared(counterparts, len(others))


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many first entries two lists share."""
    count = 0
    for one, other in zip(ids, others):
        if one != other:
            break
        count += 1
    return count
