"""Attention maps: how strongly each place of the image attends to chosen tokens of the prompt, with gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NOWHERE = -1  # in a list of places: none, where prompts have different numbers of tokens


@contextmanager
def recorded_maps(layers: Mapping[str, Any], places: Tensor, mask: Tensor | None) -> Iterator[dict[str, Tensor]]:
    """Within, a forward pass fills a dictionary: name of the layer -> map [B, heads, N, n], for N places of the image.

    `layers`: diffusers' attention modules, which attend to the text. `places`: tokens of each prompt, [B, n], NOWHERE
    for none, whose share is 0. `mask`: 1 for tokens that may be attended to, [B, L]. Hooks see the projected queries
    and keys, so that this works where the weights are sharded.
    """
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            for hook in _hooks(name, layer, places, mask, found):
                hooks.callback(hook.remove)
        yield found


def _hooks(name: str, layer: Any, places: Tensor, mask: Tensor | None, found: dict[str, Tensor]) -> list[Any]:
    seen: dict[str, Tensor] = {}

    def keep(part: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[part] = output

        return hook

    def finish(module: nn.Module, inputs: Any, output: Any) -> None:
        query, key = (_by_head(seen.pop(part), layer.heads) for part in ("query", "key"))
        found[name] = checkpoint(token_shares, query, key, places, mask, use_reentrant=False)

    sources = {"query": layer.norm_q or layer.to_q, "key": layer.norm_k or layer.to_k}
    return [
        *(source.register_forward_hook(keep(part)) for part, source in sources.items()),
        layer.register_forward_hook(finish),
    ]


def _by_head(projected: Tensor, heads: int) -> Tensor:
    """[B, N, heads x d] -> [B, heads, N, d]; a norm may see the latter already."""
    return projected if projected.dim() == 4 else projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def token_shares(query: Tensor, key: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
    """The softmax attention to some tokens, fp32 [B, heads, N, n].

    `query` [B, heads, N, d], `key` [B, heads, L, d]; `places` [B, n] and `mask` [B, L] as in `recorded_maps`. Only the
    chosen columns of the softmax are formed.
    """
    scores = query.float() @ key.float().transpose(2, 3) / query.shape[-1] ** 0.5  # [B, heads, N, L]
    if mask is not None:
        scores = scores.masked_fill(mask.view(len(mask), 1, 1, -1) == 0, -1e4)
    columns = places.clamp(min=0).view(len(places), 1, 1, -1)  # [B, 1, 1, n]
    chosen = scores.gather(3, columns.expand(-1, *scores.shape[1:3], -1))  # [B, heads, N, n]
    return (chosen - scores.logsumexp(3, keepdim=True)).exp() * (places >= 0).view(len(places), 1, 1, -1)
