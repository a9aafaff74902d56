"""Unified Concept Editing: a closed form on the keys and values of the cross-attention.

Gandikota et al., arXiv 2308.14761, eq. 7.

Let c be the input of the cross-attention at a token of the target's prompt, c* its input at the matching token of the
superclass's prompt, c_p its input at tokens of prompts to preserve, and l a ridge towards the old weights W:

    W' = (l W + e sum W c* c^T + p sum W c_p c_p^T) (l I + e sum c c^T + p sum c_p c_p^T)^-1

W factors out to the left, so W' = W T with one matrix T for all layers of one input width: one factorisation. Concepts
are edited at once. Tokens are matched from the last token of the name to the end of the prompt; a style-free prompt has
no name and is matched from its last word. The superclass's prompts, kept concepts and the empty prompt are preserved.
Which prompts published runs preserve depends on the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.data.prompts import ConceptPrompts
from sculpt_dist.maths.closed_form import EditSystem
from sculpt_dist.methods.base import Editor, matrices
from sculpt_dist.methods.parts.names import name_tokens
from sculpt_dist.methods.parts.rows import received

BATCH = 32  # concepts whose embeddings are in memory at a time


@dataclass(frozen=True)
class Config:
    """The options of uce."""

    name: str = "uce"
    """Name of this method."""
    ridge: float = 0.1
    """Ridge towards the old weights, l."""
    erase_scale: float = 1.0
    """Weight of the erased tokens, e."""
    preserve_scale: float = 0.1
    """Weight of the preserved tokens, p."""


class Method(Editor):
    """Edits keys and values of the cross-attention."""

    def __init__(self, config: Config) -> None:
        if config.ridge <= 0:
            raise ConfigError(
                f"method.ridge={config.ridge}: must be greater than 0, or the system has no single solution"
            )
        self.config = config

    def edit(self, backbone: Backbone, concepts: Sequence[ConceptPrompts]) -> Mapping[str, Tensor]:
        groups, config = backbone.groups(), self.config
        names = [*matrices(groups, "cross_attention.k"), *matrices(groups, "cross_attention.v")]
        weights = {name: backbone.net.get_parameter(name) for name in names}
        width, device = weights[names[0]].shape[1], weights[names[0]].device
        system = EditSystem(width, config.ridge, config.erase_scale, config.preserve_scale, device)
        system.add_preserved(received(backbone, [""], negative=True))
        seen: set[str] = set()
        for first in range(0, len(concepts), BATCH):
            with backbone.temporary_embeddings():
                add_concepts(system, backbone, concepts[first : first + BATCH], seen)
        transform = system.transform()
        return {name: (weight.double() @ transform).to(weight.dtype) for name, weight in weights.items()}


def add_concepts(
    system: EditSystem, backbone: Backbone, concepts: Sequence[ConceptPrompts], preserved: set[str]
) -> None:
    """Add the rows of these concepts; `preserved` holds the prompts that are preserved already, and grows."""
    kept = [text for prompts in concepts for text in (*prompts.superclass, *prompts.keep)]
    backbone.embed([*(text for prompts in concepts for text in prompts.target), *kept])
    rows = [
        aligned_rows(backbone, pair, prompts.names)
        for prompts in concepts
        for pair in zip(prompts.target, prompts.superclass)
    ]
    old, new = (torch.cat(side) for side in zip(*rows))
    system.add_erased(old, new)
    if fresh := [text for text in dict.fromkeys(kept) if text not in preserved]:
        system.add_preserved(received(backbone, fresh, negative=False))
        preserved.update(fresh)


def aligned_rows(backbone: Backbone, pair: tuple[str, str], names: tuple[str, str | None]) -> tuple[Tensor, Tensor]:
    """(c, c*) of a target's prompt and its superclass's, [n, D] each, from the last tokens of their names on."""
    old, new = (received(backbone, [prompt], negative=False) for prompt in pair)
    first, second = (name_tokens(backbone, prompt, name)[-1] for prompt, name in zip(pair, names))
    count = min(len(old) - first, len(new) - second)
    return old[first : first + count], new[second : second + count]
