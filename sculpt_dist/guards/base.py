"""The contract of a guard: fitted to a model once, it acts while images are drawn, and leaves the weights alone.

A guard is one file `guards/<name>.py` with two classes, `Config` and `Method`. A configuration selects it with
`method: {name: ...}`. What `fit` returns is stored beside the model; `act` needs nothing else, no text encoder either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.config.schema import PrepareConfig
from sculpt_dist.data.prompts import ConceptPrompts


@dataclass(frozen=True)
class Fitting:
    """What a guard is fitted to."""

    backbone: Backbone
    concepts: Sequence[ConceptPrompts]
    prepare: PrepareConfig  # how images are drawn, by a guard that needs some
    seed: int

    @property
    def targets(self) -> tuple[str, ...]:
        """The names to remove, as they appear in prompts."""
        return tuple(prompts.names[0] for prompts in self.concepts)


class Guard(ABC):
    """A method that changes no weight. All concepts are removed at once."""

    kind: ClassVar[str] = "guards"

    def __init__(self, config: Any) -> None:
        """`config`: the guard's options. Raises ConfigError for impossible ones."""
        self.config = config

    @abstractmethod
    def fit(self, fitting: Fitting) -> Mapping[str, Tensor]:
        """What the guard needs in order to act, by name; called on one rank, under `torch.no_grad`."""

    @abstractmethod
    def act(
        self, net: nn.Module, fitted: Mapping[str, Tensor], doubled: Callable[[], bool]
    ) -> Iterable[RemovableHandle]:
        """Place hooks on a denoiser; returns what removes them.

        `doubled`: whether the present call predicts for [negative, prompt], as classifier-free guidance asks. The
        denoiser may be our backbone's or that of a plain pipeline. Raises ModelError where `fitted` does not fit it.
        """
