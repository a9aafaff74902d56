"""Prompts into tokens: what is common to the text encoders, and small ones for pipelines that a CPU can train."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sculpt_dist.core.errors import ConfigError

TEXT_WIDTH = 64


def padded_tokens(tokenizer: Any, prompts: Sequence[str], length: int, cut: bool, prefix: str = "") -> Any:
    """Token ids and attention mask [B, length] of the prompts, each behind the prefix.

    Raises ConfigError for a prompt that is longer, naming where it would be cut; with `cut` it is cut there, with a warning.
    """
    room = len(tokenizer(prefix).input_ids) - len(tokenizer("").input_ids)  # that the prefix takes
    for prompt in prompts:
        ids = tokenizer(prefix + prompt).input_ids
        if len(ids) > length:
            ends = int(ids[-1] == tokenizer.eos_token_id)  # CLIP's end token stays
            lost = tokenizer.decode(ids[length - ends :], skip_special_tokens=True).strip()
            told = f"the prompt {prompt!r} has {len(ids) - room} tokens, the text encoder takes {length - room}"
            if not cut:
                raise ConfigError(
                    f"{told}: it would be cut before {lost!r}; shorten it, or cut it there with model.cut_prompts=true"
                )
            warnings.warn(f"{told}: it is cut before {lost!r}", stacklevel=2)
    return tokenizer(
        [prefix + prompt for prompt in prompts],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )


def word_tokenizer(words: Sequence[str], max_length: int = 10) -> CLIPTokenizer:
    """A CLIP tokenizer with its own vocabulary, in which each of these words is one token; other text falls to bytes."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, *(f"{letter}</w>" for letter in alphabet)])}
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        merged_symbols([*word[:-1], f"{word[-1]}</w>"], vocabulary, ranks)
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=list(ranks), model_max_length=max_length)


def merged_symbols(symbols: list[str], vocabulary: dict[str, int], ranks: dict[tuple[str, str], int]) -> None:
    """Add what BPE needs to the vocabulary and the ranks of merges, so that these symbols end as one token."""
    while len(symbols) > 1:
        # Known merges come first, lowest rank first, as BPE will apply them; a new one then joins the first two symbols.
        pairs = list(itertools.pairwise(symbols))
        place = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], math.inf))
        place = place if pairs[place] in ranks else 0
        ranks.setdefault(pairs[place], len(ranks))
        merged = "".join(pairs[place])
        vocabulary.setdefault(merged, len(vocabulary))
        symbols[place : place + 2] = [merged]


def clip_text_encoder(
    tokenizer: CLIPTokenizer, kind: type[CLIPTextModel] = CLIPTextModel, width: int = TEXT_WIDTH
) -> CLIPTextModel:
    """Untrained, two layers deep (64 wide: 0.1 M weights); `kind` may be CLIPTextModelWithProjection."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = kind(config)
    # CLIP's own spread of 0.02 leaves the words too alike for so short a training.
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight, std=0.5)
    return text_encoder
