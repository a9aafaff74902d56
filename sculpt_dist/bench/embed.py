"""Measures what encoding many prompts costs: time and memory of batches of `model.text_batch`, next to one batch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from sculpt_dist.backbones.parts.embeddings import PromptEmbeddings
from sculpt_dist.bench.measure import growth, timed
from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.engine.group import Group
from sculpt_dist.run.model import open_backbone


def bench_embed(arch: str, overrides: list[str], prompts: int, group: Group) -> dict[str, Any]:
    """Seconds and peak extra memory of embedding so many distinct prompts, in batches and all at once.

    Raises ConfigError for settings that a run refuses.
    """
    if prompts < 1:
        raise ConfigError(f"--prompts {prompts}: at least 1")
    config = load_config(None, [*overrides, f"model.arch={arch}"])
    texts = [str(i) for i in range(prompts)]  # short enough for the tiny models
    found: dict[str, Any] = {"arch": arch, "prompts": prompts, "device": str(group.device)}
    with tempfile.TemporaryDirectory() as folder:
        backbone = open_backbone(config.model, group, Path(folder))
        backbone.encode_prompts(texts[:1], False)  # loads the encoders
        for name, batch in (("batches", config.model.text_batch), ("one_batch", prompts)):
            encode = backbone.encode_prompts
            known = PromptEmbeddings(encode, backbone.with_size_ids, backbone.device, batch)
            with growth() as grown, torch.no_grad():
                seconds = timed(group, lambda: known.embed(texts, negative=False))  # noqa: B023 (called at once)
            found |= {f"{name}_of": batch, f"{name}_seconds": seconds, f"{name}_extra_bytes": grown[0]}
    return found | {"memory_ratio": found["one_batch_extra_bytes"] / found["batches_extra_bytes"]}
