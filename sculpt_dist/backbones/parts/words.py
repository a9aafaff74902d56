"""Free places in a prompt: vectors there, in place of embeddings of words, reach the denoiser with their gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sculpt_dist.backbones.io.folders import load_tokenizer
from sculpt_dist.backbones.parts.text import Tokens
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import TextCond


class Reader(Protocol):
    """What `Words` needs of a backbone."""

    folder: Path
    text_encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]

    @property
    def prompt_start(self) -> int: ...
    def part(self, name: str) -> Any: ...
    def tokenized(self, prompts: Sequence[str], negative: bool) -> Sequence[Tokens]: ...
    def encode_tokens(self, tokens: Sequence[Tokens]) -> TextCond: ...


@dataclass(frozen=True)
class Slots:
    """The tokens of one prompt with free places, which are the same for all text encoders."""

    tokens: tuple[Tokens, ...]  # for each text encoder, [1, L]
    places: slice

    def filled(self, ids: Tensor) -> list[Tokens]:
        """The tokens of B prompts in which the free places take these ids, [B, places]."""
        return [self._filled(one, ids) for one in self.tokens]

    def _filled(self, tokens: Tokens, ids: Tensor) -> Tokens:
        whole = tokens.ids.repeat(len(ids), 1)
        whole[:, self.places] = ids.to(whole)
        return Tokens(whole, tokens.mask.repeat(len(ids), 1))


class Words:
    """The tokens of a backbone's text encoders, all of which take the same ids."""

    def __init__(self, backbone: Reader) -> None:
        self.backbone = backbone

    def open(self, prompt: str, count: int) -> Slots:
        """The prompt's tokens with `count` free places before it. Raises ConfigError where there is no room."""
        start, ordinary, opened = self.backbone.prompt_start, self.ids()[0], []
        for one in self.backbone.tokenized([prompt], negative=False):
            length = one.ids.shape[1]
            room = length - int(one.mask.sum())
            if room < count:
                raise ConfigError(
                    f"the prompt {prompt!r} leaves room for {room} of {count} more tokens, as the text encoder takes "
                    f"{length}; choose fewer tokens, or a shorter prompt"
                )
            filler = one.ids.new_full((1, count), int(ordinary))  # something replaces it
            ids = torch.cat([one.ids[:, :start], filler, one.ids[:, start : length - count]], 1)
            mask = torch.cat([one.mask[:, :start], one.mask.new_ones(1, count), one.mask[:, start : length - count]], 1)
            opened.append(Tokens(ids, mask))
        return Slots(tuple(opened), slice(start, start + count))

    def embed(self, slots: Slots, vectors: Sequence[Tensor]) -> TextCond:
        """The embeddings of B prompts whose free places take these vectors, with gradient to them.

        `vectors`: [B, places, width] for each text encoder, of the kind that `table` gives.
        """
        placeholders = slots.tokens[0].ids[:, slots.places].expand(len(vectors[0]), -1)
        encoders = [self.backbone.part(name) for name in self.backbone.text_encoders]
        with _given_embeddings(encoders, slots.places, vectors):
            return self.backbone.encode_tokens(slots.filled(placeholders))

    def encode(self, slots: Slots, ids: Tensor) -> TextCond:
        """The embeddings of B prompts whose free places take these ids, [B, places], without gradient."""
        with torch.no_grad():
            return self.backbone.encode_tokens(slots.filled(ids))

    def table(self) -> list[Tensor]:
        """The embedding of every token id, [V, width], for each text encoder, scaled as the encoder scales it."""
        tables = []
        for name in self.backbone.text_encoders:
            embedding = self.backbone.part(name).get_input_embeddings()
            with torch.no_grad():
                tables.append(embedding(torch.arange(embedding.num_embeddings, device=embedding.weight.device)))
        return tables

    def vectors(self, ids: Tensor) -> list[Tensor]:
        """The embeddings of these ids [...] for each text encoder, [..., width], as in `table`."""
        with torch.no_grad():
            encoders = [self.backbone.part(name).get_input_embeddings() for name in self.backbone.text_encoders]
            return [embedding(ids.to(embedding.weight.device)) for embedding in encoders]

    def ids(self) -> Tensor:
        """The ids that a text can have, [N]: all but the tokenizer's special ones."""
        tokenizer = self._tokenizer
        return torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))

    def ids_of(self, text: str) -> list[int]:
        """The ids of a text alone."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of these ids; another tokenization of it may differ."""
        text: str = self._tokenizer.decode(list(ids))
        return text.strip()

    @property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.backbone.folder, self.backbone.tokenizers[0])


@contextmanager
def _given_embeddings(encoders: Sequence[Any], places: slice, vectors: Sequence[Tensor]) -> Iterator[None]:
    """Within, each encoder's token embeddings at these places are the vectors."""
    with ExitStack() as hooks:
        for encoder, given in zip(encoders, vectors):

            def replace(module: Any, inputs: Any, output: Tensor, given: Tensor = given) -> Tensor:
                return torch.cat([output[:, : places.start], given.to(output), output[:, places.stop :]], 1)

            hooks.callback(encoder.get_input_embeddings().register_forward_hook(replace).remove)
        yield
