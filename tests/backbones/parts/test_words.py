"""Free places in a prompt: vectors there are as good as the words they stand for, with a gradient, on every kind."""

from __future__ import annotations

import pytest
import torch

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.plugins import plugin
from sculpt_dist.worlds.find import shipped


@pytest.fixture(scope="module", params=["sd15", "sdxl", "sana"])
def backbone(request):
    kind = plugin("sculpt_dist.backbones", request.param, "model.arch").Backbone
    return kind(shipped("canvas", request.param), torch.float32, torch.device("cpu"))


def test_vectors_of_words_give_what_the_words_give(backbone):
    words = backbone.words
    whole = backbone.tokenized(["neon popart a photo of a cat"], negative=False)
    start = backbone.prompt_start
    ids = whole[0].ids[:, start : start + 2]
    slots = words.open("a photo of a cat", 2)
    for given, expected in zip(slots.filled(ids), whole):
        assert torch.equal(given.ids, expected.ids) and torch.equal(given.mask, expected.mask)
    expected = backbone.encode_prompts(["neon popart a photo of a cat"], negative=False)
    vectors = [table[ids].clone().requires_grad_() for table in words.table()]
    for found in (words.encode(slots, ids), words.embed(slots, vectors)):
        for name, value in vars(expected).items():
            assert value is None or torch.equal(getattr(found, name), value), name
    assert not any(encoder._forward_hooks for encoder in map(_embedding(backbone), backbone.text_encoders))


def test_an_empty_prompt_has_places_too(backbone):
    words = backbone.words
    slots, ids = words.open("", 1), words.ids()[5:6][None]
    found, expected = words.embed(slots, [table[ids] for table in words.table()]), words.encode(slots, ids)
    assert all(value is None or torch.equal(getattr(found, name), value) for name, value in vars(expected).items())


def test_every_text_encoder_passes_a_gradient_to_its_vectors(backbone):
    words = backbone.words
    slots = words.open("a photo", 1)
    vectors = [table[:1][None].clone().requires_grad_() for table in words.table()]
    cond = words.embed(slots, vectors)
    sum(value.float().square().sum() for value in vars(cond).values() if value is not None).backward()
    assert len(vectors) == len(backbone.text_encoders)
    assert all(vector.grad is not None and vector.grad.abs().sum() > 0 for vector in vectors)


def test_several_prompts_are_encoded_at_once(backbone):
    words = backbone.words
    slots, ids = words.open("a cat", 2), words.ids()[torch.tensor([[3, 5], [7, 9], [3, 5]])]
    many, one = words.encode(slots, ids).tokens, words.encode(slots, ids[1:2]).tokens
    assert torch.equal(many[0], many[2]) and torch.allclose(many[1:2], one, atol=1e-5)


def test_special_tokens_are_no_words_and_text_is_told(backbone):
    words = backbone.words
    special = {backbone.tokenized([""], negative=False)[0].ids[0, 0].item()}
    assert not special & set(words.ids().tolist())
    assert words.text(words.ids_of("neon cat")) == "neon cat"


def test_no_room_is_refused_with_the_numbers(backbone):
    with pytest.raises(ConfigError, match="leaves room for . of 5 more tokens"):
        backbone.words.open("a photo of a cat in neon", 5)


def _embedding(backbone):
    return lambda name: backbone.part(name).get_input_embeddings()
