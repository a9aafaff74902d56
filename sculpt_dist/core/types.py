"""The types that packages exchange.

Letters in shapes: B batch, C latent channels, H W latent size, h w image size, L tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextCond:
    """The text conditioning of a batch of prompts; members that a backbone does not use are None."""

    tokens: Tensor  # [B, L, D]
    token_mask: Tensor | None = None  # [B, L], SANA
    pooled: Tensor | None = None  # [B, P], SDXL
    size_ids: Tensor | None = None  # [B, 6], SDXL

    def map(self, change: Callable[[Tensor], Tensor]) -> TextCond:
        """Apply `change` to every member."""
        present = {f.name: member for f in fields(self) if (member := getattr(self, f.name)) is not None}
        return TextCond(**{name: change(member) for name, member in present.items()})

    def where(self, chosen: Tensor, other: TextCond) -> TextCond:
        """These conditions where `chosen` [B] is true, those of `other` elsewhere."""

        def pick(here: Tensor, there: Tensor) -> Tensor:
            return torch.where(chosen.view(-1, *[1] * (here.dim() - 1)), here, there)

        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return TextCond(**{name: pick(*pair) for name, pair in pairs.items() if pair[0] is not None})

    def __getitem__(self, index: slice | Tensor) -> TextCond:
        return self.map(lambda member: member[index])

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def cat(conds: Sequence[TextCond]) -> TextCond:
        """Concatenate along B. All conditions come from one backbone, so they have the same members."""
        present = [f.name for f in fields(TextCond) if getattr(conds[0], f.name) is not None]
        return TextCond(**{name: torch.cat([getattr(cond, name) for cond in conds]) for name in present})


@dataclass(frozen=True)
class Stream:
    """One role's samples in a micro-batch: the clean latents, and the prompts they were drawn with."""

    latents: Tensor  # [B, C, H, W], clean, scaled as the denoiser expects; [B, 0] if only prompts are needed
    cond: TextCond  # of the prompts, [B, ...]
    prompts: tuple[str, ...]  # B
    keys: tuple[int, ...]  # B, global sample ids within the role
    positions: tuple[int, ...] = ()  # B, positions in the stream's global batch; they key the random numbers
    counterpart: TextCond | None = None  # [B, ...], the prompts with the other name swapped in (see ConceptBatch)

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True)
class ConceptBatch:
    """This rank's part of a global batch: the streams that the method declared (`Method.streams`), by role.

    Each prompt has a counterpart. For the target's prompts it names the superclass instead of the target; for those of
    every other role it names the target.
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
        """None if no source of the anchor has a concept; the first concept, for example, has no earlier target."""
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
        """The prompts of a role with the other name swapped in, [B, ...]."""
        found = self.streams[role].counterpart
        assert found is not None, f"the stream {role!r} has no counterparts"
        return found


Denoiser = Callable[[Tensor, Tensor, TextCond], Tensor]  # ([B, C, H, W], [B], cond) -> [B, C, H, W]


@dataclass(frozen=True)
class Losses:
    """The weighted terms of one step; each is a scalar, logged under its name."""

    terms: Mapping[str, Tensor]

    @property
    def total(self) -> Tensor:  # []
        return torch.stack([term.float() for term in self.terms.values()]).sum()
