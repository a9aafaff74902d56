"""Prompts into tokens: what the text encoders have in common."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from sculpt_dist.core.errors import ConfigError


def padded_tokens(tokenizer: Any, prompts: Sequence[str], length: int, cut: bool, prefix: str = "") -> Any:
    """Token ids and attention mask, each [B, length], of the prompts, each after the prefix.

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
    return tokenizer(
        [prefix + prompt for prompt in prompts],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )
