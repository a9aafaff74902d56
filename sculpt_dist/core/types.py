"""The words that every floor shares. Letters in shapes: B batch, C latent channels, H W latent size, L tokens, D text width, P pooled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextCond:
    """What a denoiser is told about the prompts of a batch; members that a backbone does not use are None."""

    tokens: Tensor  # [B, L, D]
    token_mask: Tensor | None = None  # [B, L], SANA
    pooled: Tensor | None = None  # [B, P], SDXL
    size_ids: Tensor | None = None  # [B, 6], SDXL

    def map(self, change: Callable[[Tensor], Tensor]) -> TextCond:
        members = {f.name: getattr(self, f.name) for f in fields(self)}
        return TextCond(**{name: None if member is None else change(member) for name, member in members.items()})

    def __getitem__(self, index: slice | Tensor) -> TextCond:
        return self.map(lambda member: member[index])

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def cat(conds: Sequence[TextCond]) -> TextCond:
        """Join along B; all of one backbone, so the same members are present."""
        members = {}
        for f in fields(TextCond):
            parts = [getattr(cond, f.name) for cond in conds]
            members[f.name] = None if parts[0] is None else torch.cat(parts)
        return TextCond(**members)


@dataclass(frozen=True)
class Stream:
    """One role's samples of a batch: the clean latents, and the prompts that they were drawn with."""

    latents: Tensor  # [B, C, H, W], clean, scaled as the denoiser expects; [B, 0] of a role that the method needs no samples of
    cond: TextCond  # of the prompts, [B, ...]
    prompts: tuple[str, ...]  # B
    keys: tuple[int, ...]  # B, global sample ids within the role

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True)
class ConceptBatch:
    """This rank's part of a global batch; all roles have the same B."""

    target: Stream
    superclass: Stream
    anchor: Stream | None
    target_as_superclass: TextCond  # the target's prompts with the superclass in the target's place, [B, ...]
    superclass_as_target: TextCond  # the superclass's prompts with the target in the superclass's place, [B, ...]
    distractor: Stream | None = None
    distractor_as_target: TextCond | None = None  # the distractors' prompts with the target in their place, [B, ...]


Denoiser = Callable[[Tensor, Tensor, TextCond], Tensor]  # ([B, C, H, W], [B], cond) -> [B, C, H, W]


@dataclass(frozen=True)
class Losses:
    """The weighted terms of one step, each a scalar that is logged under its name."""

    terms: Mapping[str, Tensor]

    @property
    def total(self) -> Tensor:  # []
        return torch.stack([term.float() for term in self.terms.values()]).sum()
