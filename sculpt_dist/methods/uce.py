"""Unified Concept Editing: a closed form on the keys and values of the cross-attention (Gandikota et al., arXiv 2308.14761, eq. 7).

With c what the cross-attention receives at a token of the target's prompt, c* at the same token of the superclass's, c_p at tokens of
prompts to preserve, and l a ridge towards the old weights W:

    W' = (l W + e sum W c* c^T + p sum W c_p c_p^T) (l I + e sum c c^T + p sum c_p c_p^T)^-1

All sums stand right of W, so that W' = W T with one matrix T for all layers of a width: one factorisation. Concepts are edited at once.
Tokens are compared from the concept's last one to the end of the prompt. The superclass's prompts, kept concepts and the empty prompt
are preserved; which prompts published runs preserve depends on the task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Sequence

import torch
from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.data.prompts import ConceptPrompts
from sculpt_dist.errors import ConfigError
from sculpt_dist.maths.closed_form import edit_transform
from sculpt_dist.methods.base import Editor as Base
from sculpt_dist.methods.base import matrices


@dataclass(frozen=True)
class Config:
    name: str = "uce"
    ridge: float = 0.1  # l
    erase_scale: float = 1.0  # e
    preserve_scale: float = 0.1  # p


class Editor(Base):
    def __init__(self, config: Config) -> None:
        if config.ridge <= 0:
            raise ConfigError(f"method.ridge={config.ridge}: must be greater than 0, or the system has no single solution")
        self.config = config

    def edit(self, backbone: Backbone, concepts: Sequence[ConceptPrompts]) -> Mapping[str, Tensor]:
        pairs = [(target, superclass) for prompts in concepts for target, superclass in zip(prompts.target, prompts.superclass)]
        kept = list(dict.fromkeys([superclass for _, superclass in pairs] + [text for prompts in concepts for text in prompts.keep]))
        rows = [aligned_rows(backbone, target, superclass) for target, superclass in pairs]
        preserved = [torch.cat([received(backbone, text, negative=False) for text in kept]), received(backbone, "", negative=True)]
        config = self.config
        transform = edit_transform(
            torch.cat([old for old, _ in rows]).double(),
            torch.cat([new for _, new in rows]).double(),
            torch.cat(preserved).double(),
            config.ridge,
            config.erase_scale,
            config.preserve_scale,
        )
        groups = backbone.groups()
        names = [*matrices(groups, "cross_attention.k"), *matrices(groups, "cross_attention.v")]
        weights = {name: backbone.net.get_parameter(name) for name in names}
        return {name: (weight.double() @ transform).to(weight.dtype) for name, weight in weights.items()}


def received(backbone: Backbone, prompt: str, negative: bool) -> Tensor:
    """What the cross-attention receives of a prompt, one row per token that it may attend to, [n, D]."""
    cond = backbone.embed([prompt], negative)
    rows = backbone.cross_attention_input(backbone.net, cond)[0]  # [L, D]
    return rows if cond.token_mask is None else rows[cond.token_mask[0] > 0]


def aligned_rows(backbone: Backbone, target: str, superclass: str) -> tuple[Tensor, Tensor]:
    """(c, c*) from the last token of the concept on, [n, D] each; the two prompts differ in the concept alone."""
    ids = [backbone.token_ids(prompt) for prompt in (target, superclass)]
    rows = [received(backbone, prompt, negative=False) for prompt in (target, superclass)]
    after = 0  # tokens behind the concept
    while after < min(map(len, ids)) and ids[0][-1 - after] == ids[1][-1 - after]:
        after += 1
    starts = [max(0, len(tokens) - after - 1) for tokens in ids]
    count = min(len(row) - start for row, start in zip(rows, starts))
    return rows[0][starts[0] : starts[0] + count], rows[1][starts[1] : starts[1] + count]
