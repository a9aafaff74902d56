"""Small untrained components, for pipelines that a CPU can train.

Importing this file imports diffusers' models, which takes seconds: backbones import it in `write_untrained` alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sculpt_dist.backbones.parts.options import Tiny


def tiny_autoencoder(tiny: Tiny) -> AutoencoderKL:
    """An autoencoder of three levels or more (canvas: 0.23 M weights, gallery: 2.1 M)."""
    levels = len(tiny.vae["block_out_channels"])
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=tiny.latent_channels,
        norm_num_groups=8,
        sample_size=tiny.image_size,
        mid_block_add_attention=False,
        **tiny.vae,
    )


def tiny_unet(tiny: Tiny, text_width: int, **more: Any) -> UNet2DConditionModel:
    """A denoiser of two levels for 8 x 8 latents, with attention where `tiny.net` says."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=tiny.latent_channels,
        out_channels=tiny.latent_channels,
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        **tiny.net,
        **more,
    )


def tiny_scheduler(prediction: str) -> Any:
    """DPM-Solver++ on Stable Diffusion's noise schedule."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        prediction_type=prediction,
    )


def word_tokenizer(words: Sequence[str], max_length: int = 10) -> CLIPTokenizer:
    """A CLIP tokenizer with a vocabulary of its own: each of these words is one token, other text falls to bytes."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, *(f"{letter}</w>" for letter in alphabet)])}
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        merge_symbols([*word[:-1], f"{word[-1]}</w>"], vocabulary, ranks)
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    merges: list[Any] = list(ranks)  # declared as strings, taken as pairs
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def merge_symbols(symbols: list[str], vocabulary: dict[str, int], ranks: dict[tuple[str, str], int]) -> None:
    """Extend a BPE vocabulary and the ranks of its merges until these symbols merge into one token."""
    while len(symbols) > 1:
        # BPE applies known merges first, lowest rank first; where none applies, a new one joins the first two symbols.
        pairs = list(itertools.pairwise(symbols))
        place = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], math.inf))
        place = place if pairs[place] in ranks else 0
        ranks.setdefault(pairs[place], len(ranks))
        merged = "".join(pairs[place])
        vocabulary.setdefault(merged, len(vocabulary))
        symbols[place : place + 2] = [merged]


def clip_text_encoder(
    tokenizer: CLIPTokenizer,
    kind: type[CLIPTextModel | CLIPTextModelWithProjection] = CLIPTextModel,
    width: int = 64,
    layers: int = 2,
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Of 0.1 M weights where it is 64 wide."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = kind(config)
    embedding: Any = text_encoder.get_input_embeddings()
    # CLIP's own spread of 0.02 leaves the words too similar for such a short training.
    torch.nn.init.normal_(embedding.weight, std=0.5)
    return text_encoder
