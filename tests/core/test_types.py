"""The batches, conditions and losses that packages exchange."""

from __future__ import annotations

import pytest
import torch

from sculpt_dist.core.types import ConceptBatch, Losses, Stream, TextCond


def cond(*values: float, pooled: bool = False) -> TextCond:
    tokens = torch.tensor(values).view(-1, 1, 1)  # [B, 1, 1]
    return TextCond(tokens, pooled=tokens[:, 0] if pooled else None)


def test_a_condition_is_indexed_and_joined_along_its_batch():
    joined = TextCond.cat([cond(1, 2, pooled=True), cond(3, pooled=True)])
    assert len(joined) == 3 and joined.token_mask is None and joined.size_ids is None
    last = joined[1:]
    assert last.tokens.flatten().tolist() == [2, 3] and last.pooled is not None and last.pooled.tolist() == [[2], [3]]


def test_the_total_loss_is_the_sum_of_the_terms_in_fp32():
    losses = Losses({"forget": torch.tensor(1.5, dtype=torch.bfloat16), "retain": torch.tensor(2.0)})
    assert losses.total.dtype == torch.float32 and losses.total.shape == () and float(losses.total) == 3.5


def test_a_batch_without_an_anchor_stream_has_no_anchor():
    target = Stream(torch.zeros(2, 1, 1, 1), cond(1, 2), ("a", "b"), (0, 1), counterpart=cond(3, 4))
    batch = ConceptBatch({"target": target})
    assert batch.anchor is None and batch.target is target is batch["target"]
    assert batch.target_as_superclass.tokens.flatten().tolist() == [3, 4]


def test_a_stream_without_counterparts_is_named():
    batch = ConceptBatch({"superclass": Stream(torch.zeros(1, 1, 1, 1), cond(1), ("a",), (0,))})
    with pytest.raises(AssertionError, match="'superclass' has no counterparts"):
        _ = batch.superclass_as_target
