"""The arguments and the result of a denoiser's call, as diffusers' pipelines and our backbones make it.

The images of a guided call are [negative, prompt], 2 B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sculpt_dist.core.errors import ModelError
from sculpt_dist.core.types import TextCond

TEXT = {"encoder_hidden_states": "tokens", "encoder_attention_mask": "token_mask", "text_embeds": "pooled"}
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def time_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """The time of a call, which is that of all its images."""
    time = kwargs["timestep"] if "timestep" in kwargs else args[1]
    return float(time.flatten()[0]) if isinstance(time, Tensor) else float(time)


class Clock:
    """The time of the denoiser's present call."""

    time = 0.0

    def read(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.time = time_of(args, kwargs)


def with_rows(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[str | None, Tensor], Tensor]
) -> Arguments:
    """The arguments with `change(name, rows)` for all that has a row per image; `name`: of the text, as in TEXT."""
    size = len(args[0])

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: changed(name, member) for name, member in value.items()}
        has_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == size
        return change(TEXT.get(key), value) if has_rows else value

    return tuple(changed("", value) for value in args), {key: changed(key, value) for key, value in kwargs.items()}


def stored_text(cond: TextCond) -> dict[str, Tensor]:
    """What a guard stores of the embedding of one prompt, [L, D] and so on, by the names of TEXT."""
    members = {name: getattr(cond, name) for name in TEXT.values()}
    return {name: member[0] for name, member in members.items() if member is not None}


def rows_of(text: Mapping[str, Tensor], name: str, like: Tensor, count: int) -> Tensor:
    """`count` rows of stored text in place of rows `like`. Raises ModelError where they are of another length."""
    stored = text.get(name)
    if stored is None or stored.shape != like.shape[1:]:
        found = "nothing" if stored is None else list(stored.shape)
        raise ModelError(
            f"the guard holds {found} as {name} of its text, the pipeline gives {list(like.shape[1:])}: call it with "
            "the max_sequence_length that the model card names"
        )
    return stored.to(like).expand(count, *stored.shape)


def with_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a module returns, a tensor, a tuple or a diffusers output, with its first tensor changed."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    output["sample"] = change(output["sample"])
    return output
