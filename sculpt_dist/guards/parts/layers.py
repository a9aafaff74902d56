"""The modules of a denoiser on which guards act, found by name."""

from __future__ import annotations

import re

from torch import nn

from sculpt_dist.backbones.parts.groups import BLOCKS, attention_role

BLOCK = re.compile(r"(.+\.attentions|transformer_blocks)\.\d+")  # of UNets, and of a DiT


def text_values(net: nn.Module) -> dict[str, nn.Module]:
    """The projections to values with which the image attends to the text, by name."""
    return {
        name: module
        for name, module in net.named_modules()
        if name.endswith(".to_v") and attention_role(f"{name}.weight") == ("text_to_image", "v")
    }


def transformer_blocks(net: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks by name, in the order of a forward pass: down, middle and up for UNets."""
    found = {name: module for name, module in net.named_modules() if BLOCK.fullmatch(name)}
    return {name: found[name] for name in sorted(found, key=lambda name: BLOCKS.index(name.split(".")[0]))}
