"""Where a concept's name stands among the tokens that the denoiser reads of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.parts.attention import NOWHERE
from sculpt_dist.data.prompts import naming
from sculpt_dist.methods.base import Setup


def name_tokens(backbone: Backbone, prompt: str, name: str | None) -> range:
    """The places of the name's last mention in the prompt; of all the prompt's words where it has none."""
    found = list(naming(name).finditer(prompt)) if name else []
    return backbone.token_places(prompt, *(found[-1].span() if found else ()))


def target_tokens(setup: Setup) -> dict[str, tuple[int, ...]]:
    """The places of the target's name in each of its prompts; of any target's, where several train together."""
    own = setup.prompts.names[0]
    names = [own] if own else [concept.target for concept in setup.concepts]
    found = {}
    for prompt in dict.fromkeys(setup.prompts.target):
        name = next((name for name in names if naming(name).search(prompt)), None)
        found[prompt] = tuple(name_tokens(setup.backbone, prompt, name))
    return found


def padded(places: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Lists of places as [B, n], filled up with NOWHERE."""
    longest = max(map(len, places))
    return torch.tensor([[*row, *[NOWHERE] * (longest - len(row))] for row in places], device=device)
