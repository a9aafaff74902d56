"""Measures what UCE's closed form costs for many concepts at real sizes. Embeddings are random, not encoded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sculpt_dist.bench.mask import PRESETS
from sculpt_dist.bench.measure import growth, timed
from sculpt_dist.config.schema import Concept, PrepareConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import derived_seed
from sculpt_dist.core.types import TextCond
from sculpt_dist.data.prompts import concept_prompts
from sculpt_dist.engine.group import Group
from sculpt_dist.methods.uce import Config, Method

WIDTHS = {"sd15": 768, "sdxl": 2048, "sana": 2240}  # of the cross-attention's input
TOKENS = 77


class RandomBackbone:
    """Keys and values of a model's size, and an embedding of every prompt, seeded by it."""

    def __init__(self, preset: str, device: torch.device) -> None:
        self.width, self.device = WIDTHS[preset], device
        rng = torch.Generator(device).manual_seed(0)
        sizes = PRESETS[preset] if preset == "sana" else [n for n in PRESETS[preset] if math.isqrt(n) ** 2 != n]
        kept = sizes[: len(sizes) // 2] if preset == "sana" else sizes  # of q, k, v and o, the keys and values
        self.net = nn.Module()
        for i, size in enumerate(kept):
            weight = torch.randn(size // self.width, self.width, generator=rng, device=device)
            self.net.register_parameter(f"matrix{i}", nn.Parameter(weight, requires_grad=False))

    def groups(self) -> Mapping[str, tuple[str, ...]]:
        names = tuple(name for name, _ in self.net.named_parameters())
        return {"cross_attention.k": names[::2], "cross_attention.v": names[1::2], "matrices": names}

    def embed(self, prompts: Sequence[str], negative: bool = False) -> TextCond:
        rows = [torch.randn(TOKENS, self.width, generator=self._generator(prompt)) for prompt in prompts]
        return TextCond(torch.stack(rows).to(self.device))

    def temporary_embeddings(self) -> AbstractContextManager[None]:
        return nullcontext()

    def cross_attention_input(self, net: nn.Module, cond: TextCond) -> Tensor:
        return cond.tokens

    def token_places(self, prompt: str, start: int = 0, end: int | None = None) -> range:
        return range(len(prompt[:start].split()), len(prompt[:end].split()))  # every word is a token

    def _generator(self, prompt: str) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(prompt))


def bench_edit(preset: str, concepts: int, group: Group) -> dict[str, Any]:
    """Seconds and memory of the whole edit of so many concepts, with the default prompts. Raises ConfigError."""
    if preset not in WIDTHS or concepts < 1:
        raise ConfigError(f"--preset {preset} --concepts {concepts}: choose one of {', '.join(WIDTHS)}; at least 1")
    backbone: Any = RandomBackbone(preset, group.device)
    names = [Concept(target=f"target {i}", superclass=f"class {i % 20}") for i in range(concepts)]
    prompts = [concept_prompts(concept, PrepareConfig()) for concept in names]
    edited: list[Mapping[str, Tensor]] = []
    with growth() as grown:
        seconds = timed(group, lambda: edited.append(Method(Config()).edit(backbone, prompts)))
    finite = all(bool(torch.isfinite(weight).all()) for weight in edited[0].values())
    assert finite, "the edit is not finite"
    result = sum(weight.nbytes for weight in edited[0].values())
    return {
        "preset": preset,
        "concepts": concepts,
        "prompts": sum(len(concept.target) for concept in prompts),
        "matrices": len(edited[0]),
        "weights": sum(weight.numel() for weight in edited[0].values()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(group.device),
        "seconds": seconds,
        "extra_memory_bytes": grown[0] - result,
    }
