"""The sources of a stream: shards, prompts alone, and how several of them are opened late or take turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from sculpt_dist.data.shards import Sample


class PromptReader:
    """Samples without latents: the prompts in turn, as `ShardReader` would give them."""

    def __init__(self, prompts: Sequence[str], count: int, size_ids: tuple[int, ...] | None) -> None:
        self.prompts, self.count, self.size_ids = list(prompts), count, size_ids

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> Sample:
        return Sample(torch.empty(0), self.prompts[position % len(self.prompts)], position, self.size_ids)


class Reader(Protocol):
    """A source of samples: a folder of shards, or prompts alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> Sample: ...


class InTurn:
    """A source of concept c of n that train together: sample k has the key k n + c (see `prompts.taking_turns`)."""

    def __init__(self, reader: Reader, concept: int, concepts: int) -> None:
        self.reader, self.concept, self.concepts = reader, concept, concepts

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, position: int) -> Sample:
        sample = self.reader[position]
        return replace(sample, key=sample.key * self.concepts + self.concept)


class LateSources:
    """The sources of a stream, each opened when its turn comes: of many earlier targets, few have one in a concept."""

    def __init__(self, count: int, open_source: Callable[[int], Reader]) -> None:
        """`open_source` opens the source at a place below `count`."""
        self._count, self._open_source = count, open_source
        self._opened: dict[int, Reader] = {}

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Reader]:
        return map(self.__getitem__, range(self._count))

    def __getitem__(self, place: int) -> Reader:
        if place not in self._opened:
            self._opened[place] = self._open_source(place)
        return self._opened[place]
