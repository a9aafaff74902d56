"""AdaVD: what the image attends to loses the part that lies along the targets.

Wang et al., "Precise, Fast, and Low-cost Concept Erasure in Value Space", arXiv 2412.06143. Let v be the value of a
token in a layer where the image attends to the text, all heads together, and v* that of the target: W_V times the
embedding of the last token of its name. Then

    v' = v - f(cos(v*, v)) <v*, v> / <v*, v*> v*,    f(s) = c / (1 + exp(-a (s - b)))

Several targets are made orthogonal by Gram-Schmidt. The first token, which is the same in all prompts, stays. The
released code takes the values of a prompt and of its negative prompt for one vector; here, as in the equations, each
is changed by itself, so that the guard also acts where there is no guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.core.errors import ModelError
from sculpt_dist.guards.base import Fitting, Guard
from sculpt_dist.guards.parts.calls import Clock
from sculpt_dist.guards.parts.layers import text_values
from sculpt_dist.maths.value_decomposition import erased_part, gram_schmidt, shift_factor


@dataclass(frozen=True)
class Config:
    """The options of adavd."""

    name: str = "adavd"
    """Name of this guard."""
    token_similarity: bool = True
    """Whether f depends on the similarity of a token to the target; false: f = 1, and all of the part goes."""
    slope: float = 100.0
    """How sharply f rises with the similarity, a."""
    middle: float = 0.93
    """The similarity at which f has half its height, b."""
    height: float = 2.0
    """What f rises to, c."""
    decomp_timestep: float = 0.0
    """Nothing is taken away at this time of the sampler and below."""


class Method(Guard):
    """Changes the output of every projection to values."""

    def fit(self, fitting: Fitting) -> Mapping[str, Tensor]:
        """The targets' values of every layer, [n, d]."""
        backbone = fitting.backbone
        received = torch.stack([_last_token(backbone, target) for target in fitting.targets])  # [n, D]
        return {name: module(received).float() for name, module in text_values(backbone.net).items()}

    def act(
        self, net: nn.Module, fitted: Mapping[str, Tensor], doubled: Callable[[], bool]
    ) -> Iterable[RemovableHandle]:
        modules = text_values(net)
        if modules.keys() != fitted.keys():
            raise ModelError(
                f"the guard adavd holds values of {len(fitted)} layers, {type(net).__name__} has {len(modules)}, or "
                "others: fit the guard to this model"
            )
        clock = Watch()
        hooks = [net.register_forward_pre_hook(clock.read, with_kwargs=True)]
        for name, module in modules.items():
            hooks.append(module.register_forward_hook(Decomposition(self.config, fitted[name], clock).changed))
        return [*hooks, net.register_forward_hook(clock.check)]


class Watch(Clock):
    """Also notes whether any values passed in the present call."""

    acted = False

    def check(self, net: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a call. Raises ModelError where the guard did not act, as with fused projections."""
        acted, self.acted = self.acted, False
        if not acted:
            raise ModelError(
                f"{type(net).__name__}: its projections to values were not called, so that the guard adavd cannot act; "
                "undo fuse_qkv_projections()"
            )


class Decomposition:
    """Changes the values of one layer."""

    def __init__(self, config: Config, values: Tensor, clock: Watch) -> None:
        transform, basis = gram_schmidt(values)
        self.config, self.clock = config, clock
        self.values, self.transform, self.basis = values, transform.float(), basis.float()

    def changed(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]."""
        self.clock.acted = True
        if self.clock.time <= self.config.decomp_timestep:
            return output
        values, transform, basis = (one.to(output.device) for one in (self.values, self.transform, self.basis))
        tokens = output[:, 1:].float()
        factors = self._factors(tokens, values)
        kept = tokens - erased_part(tokens, values, factors, transform, basis)
        return torch.cat([output[:, :1], kept.to(output.dtype)], 1)

    def _factors(self, tokens: Tensor, values: Tensor) -> Tensor:
        """f of each target at each token, [B, L, n]."""
        config = self.config
        similarity = nn.functional.cosine_similarity(tokens[..., None, :], values, dim=-1)
        if not config.token_similarity:
            return torch.ones_like(similarity)
        return shift_factor(similarity, config.slope, config.middle, config.height)


def _last_token(backbone: Backbone, name: str) -> Tensor:
    """What the cross-attention receives of the last token of a name that stands alone, [D]."""
    rows = backbone.cross_attention_input(backbone.net, backbone.embed([name]))  # [1, L, D]
    return rows[0, backbone.token_places(name)[-1]]
