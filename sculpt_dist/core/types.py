"""The types that cross rooms.

Letters in shapes: B batch, C latent channels, H W latent size, h w image size, L tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextCond:
    """What a denoiser knows about the prompts of a batch; members that a backbone does not use are None."""

    tokens: Tensor  # [B, L, D]
    token_mask: Tensor | None = None  # [B, L], SANA
    pooled: Tensor | None = None  # [B, P], SDXL
    size_ids: Tensor | None = None  # [B, 6], SDXL

    def map(self, change: Callable[[Tensor], Tensor]) -> TextCond:
        """The condition with `change` applied to every member."""
        members = {f.name: getattr(self, f.name) for f in fields(self)}
        return TextCond(**{name: None if member is None else change(member) for name, member in members.items()})

    def __getitem__(self, index: slice | Tensor) -> TextCond:
        return self.map(lambda member: member[index])

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def cat(conds: Sequence[TextCond]) -> TextCond:
        """Join along B. All conditions come from one backbone, so the same members are present."""
        members = {}
        for f in fields(TextCond):
            parts = [getattr(cond, f.name) for cond in conds]
            members[f.name] = None if parts[0] is None else torch.cat(parts)
        return TextCond(**members)


@dataclass(frozen=True)
class Stream:
    """One role's samples of a micro-batch: the clean latents, and the prompts that they were drawn with."""

    latents: Tensor  # [B, C, H, W], clean, scaled as the denoiser expects; [B, 0] where only prompts were asked for
    cond: TextCond  # of the prompts, [B, ...]
    prompts: tuple[str, ...]  # B
    keys: tuple[int, ...]  # B, global sample ids within the role
    positions: tuple[int, ...] = ()  # B, places in the stream's global batch; random numbers are keyed by them
    counterpart: TextCond | None = None  # [B, ...], the same prompts with another name in place (see ConceptBatch)

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True)
class ConceptBatch:
    """This rank's part of a global batch: the streams that the method declared (`Method.streams`), by role.

    The counterpart of the target's prompts names the superclass in the target's place; that of any other role names the
    target in its place.
    """

    streams: Mapping[str, Stream]

    def __getitem__(self, role: str) -> Stream:
        return self.streams[role]

    @property
    def target(self) -> Stream:
        return self.streams["target"]

    @property
    def superclass(self) -> Stream:
        return self.streams["superclass"]

    @property
    def distractor(self) -> Stream:
        return self.streams["distractor"]

    @property
    def anchor(self) -> Stream | None:
        """None where none of the anchor's sources has a concept: the first one has no earlier target, for example."""
        return self.streams.get("anchor")

    @property
    def target_as_superclass(self) -> TextCond:
        return self.counterpart("target")

    @property
    def superclass_as_target(self) -> TextCond:
        return self.counterpart("superclass")

    @property
    def distractor_as_target(self) -> TextCond:
        return self.counterpart("distractor")

    def counterpart(self, role: str) -> TextCond:
        """The prompts of a role with the other name in place, [B, ...]."""
        found = self.streams[role].counterpart
        assert found is not None, f"the stream {role!r} has no counterparts"
        return found


Denoiser = Callable[[Tensor, Tensor, TextCond], Tensor]  # ([B, C, H, W], [B], cond) -> [B, C, H, W]


@dataclass(frozen=True)
class Losses:
    """The weighted terms of one step, each a scalar that is logged under its name."""

    terms: Mapping[str, Tensor]

    @property
    def total(self) -> Tensor:  # []
        return torch.stack([term.float() for term in self.terms.values()]).sum()
