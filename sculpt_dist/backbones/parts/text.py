"""Prompts into tokens: what the text encoders have in common."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sculpt_dist.core.errors import ConfigError


@dataclass(frozen=True)
class Tokens:
    """The input of one text encoder."""

    ids: Tensor  # [B, L] int64
    mask: Tensor  # [B, L] int64, 1 where a token is no padding

    def to(self, device: torch.device) -> Tokens:
        return Tokens(self.ids.to(device), self.mask.to(device))


def padded_tokens(tokenizer: Any, prompts: Sequence[str], length: int, cut: bool, prefix: str = "") -> Tokens:
    """The tokens [B, length] of the prompts, each after the prefix.

    Raises ConfigError for a longer prompt, and says where it would be cut; with `cut` it is cut there, with a warning.
    """
    prefix_tokens = len(tokenizer(prefix).input_ids) - len(tokenizer("").input_ids)
    for prompt in prompts:
        ids = tokenizer(prefix + prompt).input_ids
        if len(ids) > length:
            ends = int(ids[-1] == tokenizer.eos_token_id)  # CLIP's end token stays
            lost = tokenizer.decode(ids[length - ends :], skip_special_tokens=True).strip()
            fault = (
                f"the prompt {prompt!r} has {len(ids) - prefix_tokens} tokens, "
                f"the text encoder takes {length - prefix_tokens}"
            )
            if not cut:
                raise ConfigError(
                    f"{fault}: it would be cut before {lost!r}; shorten it, or cut it there with model.cut_prompts=true"
                )
            warnings.warn(f"{fault}: it is cut before {lost!r}", stacklevel=2)
    found = tokenizer(
        [prefix + prompt for prompt in prompts],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )
    return Tokens(found.input_ids, found.attention_mask)
