"""SANA: SanaTransformer2DModel (linear self-attention, DiT), Gemma 2 text encoder, AutoencoderDC; flow matching."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sculpt_dist.backbones.base import Backbone as Base
from sculpt_dist.backbones.io.folders import component_config, load_tokenizer
from sculpt_dist.backbones.parts.options import Tiny
from sculpt_dist.backbones.parts.schedules import FlowSchedule
from sculpt_dist.backbones.parts.text import Tokens, padded_tokens
from sculpt_dist.core.types import TextCond

if TYPE_CHECKING:
    from transformers import Gemma2Model, GemmaTokenizer

MAX_TOKENS = 300  # per prompt, the pipeline's own limit
DEFAULT_SIZE = 1024  # of the pipeline's images, whatever its net was made for
BINNED = (16, 32, 64, 128)  # latent sizes that the pipeline rounds an image's size to; others it refuses
TINY_TOKENS = 10  # per prompt of the tiny model
SPACE = "\u2581"  # Gemma's normalizer turns spaces into it


class Backbone(Base):
    """The SANA pipeline (Xie et al., arXiv 2410.10629).

    At 1024 pixels: latents [B, 32, 32, 32], tokens [B, 300, 2304] with their mask.
    """

    net_name, net_class = "transformer", "diffusers.SanaTransformer2DModel"
    conditions = {"guidance_embeds": (None,)}
    pipeline_class = "SanaPipeline"
    parts = {"vae": "diffusers.AutoencoderDC", "text_encoder": "transformers.Gemma2Model"}
    schedule_class = FlowSchedule
    tiny = {
        "small": Tiny(
            32,
            {"num_layers": 4, "num_attention_heads": 7, "num_cross_attention_heads": 4, "cross_attention_head_dim": 28},
            {"channels": (16, 32, 32)},
            vae_steps=600,
            steps=4002,
        ),
    }

    def vae_levels(self) -> int:
        return len(component_config(self.folder, "vae")["encoder_block_out_channels"])

    def tokenized(self, prompts: Sequence[str], negative: bool) -> Sequence[Tokens]:
        """Token ids and mask; the pipeline's default instruction precedes a prompt that is not negative."""
        tokenizer = load_tokenizer(self.folder, "tokenizer")
        tokenizer.padding_side = "right"
        prefix, window = "", self.length
        if not negative:
            instruction = default_instruction()
            instructed = self._instructed(tokenizer, instruction)
            if instructed <= self._room:
                prefix, window = instruction, instructed
        texts = [prompt.lower().strip() for prompt in prompts]
        return [padded_tokens(tokenizer, texts, window, self.options.cut_prompts, prefix)]

    @property
    def _room(self) -> int:
        """Positions of the text encoder; the tiny one has none for the instruction, and never saw it."""
        return component_config(self.folder, "text_encoder")["max_position_embeddings"]

    def _instructed(self, tokenizer: Any, instruction: str) -> int:
        """Tokens of the instruction and a prompt."""
        return len(tokenizer.encode(instruction)) - 2 + self.length

    def pipeline_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.image_size != DEFAULT_SIZE or self.net_settings["sample_size"] not in BINNED:
            options = {"height": self.image_size, "width": self.image_size, "use_resolution_binning": False}
        if self._instructed(load_tokenizer(self.folder, "tokenizer"), default_instruction()) > self._room:
            options["complex_human_instruction"] = None
        return options if self.length == MAX_TOKENS else options | {"max_sequence_length": self.length}

    @property
    def length(self) -> int:
        """Tokens per prompt, without the instruction."""
        return min(MAX_TOKENS, load_tokenizer(self.folder, "tokenizer").model_max_length)

    def encode_tokens(self, tokens: Sequence[Tokens]) -> TextCond:
        """Gemma's last hidden states of the first token and the last ones; most of the instruction is dropped."""
        given, encoder = tokens[0].to(self.device), self.part("text_encoder")
        hidden = encoder(given.ids, attention_mask=given.mask)[0]  # [B, window, D]
        kept = self._kept(hidden.shape[1])
        return TextCond(hidden[:, kept], token_mask=given.mask[:, kept])  # [B, L, D], [B, L]

    def _kept(self, window: int) -> list[int]:
        return [0, *range(window - self.length + 1, window)]

    def token_ids(self, prompt: str) -> list[int]:
        tokens = self.tokenized([prompt], negative=False)[0]
        kept = self._kept(tokens.ids.shape[1])
        return tokens.ids[0, kept][tokens.mask[0, kept] > 0].tolist()

    @property
    def prompt_start(self) -> int:
        tokenizer, instruction = load_tokenizer(self.folder, "tokenizer"), default_instruction()
        return len(tokenizer.encode(instruction)) if self._instructed(tokenizer, instruction) <= self._room else 1

    def cross_attention_input(self, net: Any, cond: TextCond) -> Tensor:
        """The normalized output of the caption projection."""
        projected = net.caption_projection(cond.tokens.to(net.dtype))
        return net.caption_norm(projected)

    def encode(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            latents = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent.float()
        return latents * self.vae.config.scaling_factor

    def decode_pixels(self, latents: Tensor) -> Tensor:
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample

    def autoencode(self, pixels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        latents = self.vae.encode(pixels).latent
        noise = torch.randn(latents.shape, generator=rng)
        offset, excess = latents.mean((0, 2, 3)), latents.var((0, 2, 3)) - 1  # [C]: each channel about unit normal
        return self.vae.decode(latents + 0.1 * noise).sample, 1e-2 * (offset.square().mean() + excess.square().mean())

    def denoise(self, net: nn.Module, noisy: Tensor, time: Tensor, cond: TextCond) -> Tensor:
        dtype = next(net.parameters()).dtype
        velocity = net(
            noisy.to(dtype),
            encoder_hidden_states=cond.tokens.to(dtype),
            encoder_attention_mask=cond.token_mask,
            timestep=time * self.net_settings.get("timestep_scale", 1.0),
            return_dict=False,
        )[0]
        return velocity.float()[:, : noisy.shape[1]]  # some nets also predict a variance

    @classmethod
    def write_untrained(cls, folder: Path, words: Sequence[str], seed: int, size: Tiny) -> None:
        from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

        tokenizer = _word_tokenizer(words)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vae = _tiny_autoencoder(size)
            text_encoder = _tiny_gemma(tokenizer, words, size.text_width)
            transformer = SanaTransformer2DModel(
                in_channels=size.latent_channels,
                out_channels=size.latent_channels,
                attention_head_dim=16,
                cross_attention_dim=16 * size.net["num_attention_heads"],
                caption_channels=size.text_width,
                mlp_ratio=2.0,
                sample_size=8,
                patch_size=2,
                interpolation_scale=1.0,  # without it the tiny net has no position embedding
                **size.net,
            )
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=1000, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0
        )
        SanaPipeline(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        ).save_pretrained(folder)


def default_instruction() -> str:
    """The text that the pipeline puts before a prompt by default."""
    from diffusers import SanaPipeline

    return "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


def _word_tokenizer(words: Sequence[str]) -> GemmaTokenizer:
    """A Gemma tokenizer in which each of these words, with or without a space after it, is one token.

    Other text falls to bytes.
    """
    from transformers import GemmaTokenizer

    from sculpt_dist.backbones.parts.tiny import merge_symbols

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    symbols = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *"abcdefghijklmnopqrstuvwxyz0123456789.,"]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        for ending in (SPACE, ""):
            merge_symbols(list(word + ending), vocabulary, ranks)
    merges: list[Any] = list(ranks)  # declared as strings, taken as pairs
    # Without add_bos_token the empty prompt would be all padding, and attention to it NaN.
    return GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, model_max_length=TINY_TOKENS)


def _tiny_gemma(tokenizer: GemmaTokenizer, words: Sequence[str], width: int) -> Gemma2Model:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=64,
        sliding_window=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    gemma = Gemma2Model(config)
    embedding, place = gemma.embed_tokens.weight, tokenizer.get_vocab()
    # The usual spread of 0.02 leaves the words too similar for such a short training.
    torch.nn.init.normal_(embedding, std=0.5)
    with torch.no_grad():
        for word in words:  # a word has the same embedding at the end of a prompt as before a space
            embedding[place[word]] = embedding[place[word + SPACE]]
    return gemma


def _tiny_autoencoder(size: Tiny) -> Any:
    from diffusers import AutoencoderDC

    channels: Any = size.vae["channels"]
    ones, none = (1,) * len(channels), ((),) * len(channels)
    return AutoencoderDC(
        in_channels=3,
        latent_channels=size.latent_channels,
        attention_head_dim=16,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=ones,
        decoder_layers_per_block=ones,
        encoder_qkv_multiscales=none,
        decoder_qkv_multiscales=none,
    )
