"""Negative prompt: classifier-free guidance leads away from the targets' names instead of from the empty prompt.

The guidance is that of Ho and Salimans, arXiv 2207.12598, eq. 6, with the names in place of no prompt; negative prompts
are a practice of users, without a paper. A pipeline's own negative prompt is replaced. Where there is no guidance, as
in attacks that optimise the plain denoiser, this guard does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sculpt_dist.guards.base import Fitting, Guard
from sculpt_dist.guards.parts.calls import Arguments, rows_of, stored_text, with_rows


@dataclass(frozen=True)
class Config:
    """The options of negative_prompt."""

    name: str = "negative_prompt"
    """Name of this guard."""
    text: str | None = None
    """Negative prompt; null: the targets' names, with commas between them."""


class Method(Guard):
    """Replaces the negative half's text."""

    def fit(self, fitting: Fitting) -> Mapping[str, Tensor]:
        text = self.config.text or ", ".join(fitting.targets)
        return stored_text(fitting.backbone.embed([text], negative=True))

    def act(
        self, net: nn.Module, fitted: Mapping[str, Tensor], doubled: Callable[[], bool]
    ) -> Iterable[RemovableHandle]:
        def replaced(name: str | None, rows: Tensor) -> Tensor:
            if name is None:
                return rows
            half = len(rows) // 2
            return torch.cat([rows_of(fitted, name, rows, half), rows[half:]])

        def before(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            return with_rows(args, kwargs, replaced) if doubled() else None

        return [net.register_forward_pre_hook(before, with_kwargs=True)]
