"""Untrained pipelines small enough for a CPU, of the same diffusers classes as the checkpoints they stand for."""

from __future__ import annotations

import math
from typing import Sequence

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_WIDTH = 64
LATENT_CHANNELS = 4
LATENT_SIZE = 8  # 32 pixels: the VAE halves twice


def word_tokenizer(words: Sequence[str], max_length: int = 10) -> CLIPTokenizer:
    """A CLIP tokenizer with its own vocabulary, in which each of these words is one token; other text falls to bytes."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, *(f"{letter}</w>" for letter in alphabet)])}
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        while len(symbols) > 1:
            # Known merges come first, lowest rank first, as BPE will apply them; a new one then joins the first two symbols.
            pairs = list(zip(symbols, symbols[1:]))
            place = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], math.inf))
            place = place if pairs[place] in ranks else 0
            ranks.setdefault(pairs[place], len(ranks))
            merged = "".join(pairs[place])
            vocabulary.setdefault(merged, len(vocabulary))
            symbols[place : place + 2] = [merged]
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=list(ranks), model_max_length=max_length)


def sd15(words: Sequence[str], seed: int) -> StableDiffusionPipeline:
    """A pipeline of the SD 1.5 kind for 32 x 32 images, initialised from `seed` and otherwise untrained (2.1 M weights)."""
    tokenizer = word_tokenizer(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = _image_autoencoder()
        text_encoder = _clip_text_encoder(tokenizer)
        unet = UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=(56, 80),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),  # attention at 4 x 4 only
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,  # diffusers reads this as the number of heads
            norm_num_groups=8,
        )
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _image_autoencoder() -> AutoencoderKL:
    channels = (16, 32, 32)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def _clip_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = CLIPTextModel(config)
    # CLIP's own spread of 0.02 leaves the words too alike for so short a training.
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight, std=0.5)
    return text_encoder
