"""Prompts pass the text encoders once each, and a few at a time."""

from __future__ import annotations

import torch

from sculpt_dist.backbones.parts.embeddings import PromptEmbeddings
from sculpt_dist.core.types import TextCond


def test_two_thousand_prompts_pass_the_encoders_once_and_sixteen_at_a_time():
    batches: list[list[str]] = []

    def encode(prompts: list[str], negative: bool) -> TextCond:
        batches.append(list(prompts))
        return TextCond(torch.tensor([[[float(prompt), float(negative)]] for prompt in prompts]))

    embeddings = PromptEmbeddings(encode, lambda cond: cond, torch.device("cpu"), batch=16)
    prompts = [str(i % 2000) for i in range(3000)]
    found = embeddings.embed(prompts, negative=False)
    assert found.tokens[:, 0].tolist() == [[float(prompt), 0.0] for prompt in prompts]
    assert [len(batch) for batch in batches] == [16] * 125 and len({p for batch in batches for p in batch}) == 2000
    embeddings.embed(["7"], negative=True)
    assert batches[-1] == ["7"] and len(batches) == 126
