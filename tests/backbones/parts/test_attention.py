"""Attention maps to chosen tokens against what the layers themselves compute; places of tokens and shared rows."""

from __future__ import annotations

import pytest
import torch
from harness import PROJECT

from sculpt_dist.backbones.parts.attention import NOWHERE
from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.plugins import plugin
from sculpt_dist.methods.mace import _end
from sculpt_dist.methods.parts.rows import shared_rows
from sculpt_dist.run.setup import resolve

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas"
ARCHS = ["sd15", "sdxl", "sana"]


def backbone_of(arch: str):
    return plugin("sculpt_dist.backbones", arch, "").Backbone(ASSETS / arch, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_maps_times_the_values_are_what_a_layer_puts_out(arch):
    backbone = backbone_of(arch)
    cond = backbone.embed(["a photo of a cat", "a cat in neon style"])
    noisy, time = torch.randn(2, *backbone.latent_shape), torch.tensor([500.0, 300.0])
    places = torch.arange(cond.tokens.shape[1]).repeat(2, 1)
    seen: dict[str, torch.Tensor] = {}
    with backbone.attention_maps(backbone.net, places, cond) as maps:
        backbone.denoise(backbone.net, noisy, time, cond)
    name = list(maps)[1]
    layer = backbone.net.get_submodule(name)
    layer.to_v.register_forward_hook(lambda module, inputs, output: seen.update(values=output))
    layer.to_out[0].register_forward_hook(lambda module, inputs, output: seen.update(out=inputs[0]))
    backbone.denoise(backbone.net, noisy, time, cond)
    values = seen["values"].unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    torch.testing.assert_close((maps[name] @ values).transpose(1, 2).flatten(2), seen["out"], rtol=1e-4, atol=1e-5)
    few = torch.tensor([[2, NOWHERE], [1, 2]])
    with backbone.attention_maps(backbone.net, few, cond, [name]) as chosen:
        backbone.denoise(backbone.net, noisy, time, cond)
    assert list(chosen) == [name] and float(chosen[name][0, ..., 1].abs().max()) == 0.0
    torch.testing.assert_close(chosen[name][1], maps[name][1, ..., 1:3])


@pytest.mark.parametrize("arch", ARCHS)
def test_tokens_of_a_part_of_a_prompt_and_what_two_prompts_share(arch):
    backbone = backbone_of(arch)
    prompt = "a photo of a cat"
    places, whole = backbone.token_places(prompt, 13, 16), backbone.token_places(prompt)
    assert list(places) == [whole.stop - 1] and len(whole) == 5 and whole.start == 1
    assert _end(backbone, prompt) == (() if arch == "sana" else (whole.stop,))  # Gemma ends no prompt
    old, new = shared_rows(backbone, prompt, "a photo of a animal")
    rows = backbone.cross_attention_input(backbone.net, backbone.embed([prompt]))[0]
    assert old.shape == new.shape == (5 if arch == "sana" else len(rows) - 1, rows.shape[1])
    torch.testing.assert_close(old[:5], rows[:5])  # the start token and four words
    torch.testing.assert_close(new[:5], rows[:5])  # the encoders read from left to right
    if arch != "sana":
        assert not torch.equal(old[5:], new[5:])  # what follows the name remembers it


@pytest.mark.parametrize("method", ["fmn", "mace"])
@pytest.mark.parametrize("key", ["checkpointing", "compile"])
def test_methods_that_read_maps_refuse_what_hides_them(method, key):
    concepts = "concepts=[{target: cat, superclass: animal}]"
    with pytest.raises(ConfigError, match=f"engine.{key}=true: method.name={method} reads attention maps"):
        resolve(load_config(None, [f"method.name={method}", "mask.keep=1", f"engine.{key}=true", concepts]))
