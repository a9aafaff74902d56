"""The streams of a concept, batch by batch: one integer of state, the same samples for any number of ranks and workers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sculpt_dist.core.files import derived_seed
from sculpt_dist.core.signals import STOPPING
from sculpt_dist.core.types import ConceptBatch, Stream, TextCond
from sculpt_dist.data.prompts import ConceptPrompts
from sculpt_dist.data.shards import Sample, ShardReader

ROLES = ("target", "superclass", "anchor", "distractor")


@dataclass(frozen=True)
class Layout:
    """How a global batch of `batch` samples per stream is cut: micro-batch `a` of rank `r` is one consecutive slice."""

    batch: int
    ranks: int
    rank: int
    accumulate: int

    def positions(self, micro: int) -> range:
        """This rank's positions within the global batch."""
        size = self.batch // (self.ranks * self.accumulate)
        first = (micro * self.ranks + self.rank) * size
        return range(first, first + size)


class GlobalOrder:
    """Which sample stands at each place of an endless stream: every epoch a fresh permutation, from the seed alone."""

    def __init__(self, count: int, seed: Sequence[int]) -> None:
        self.count, self.seed = count, list(seed)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, place: int) -> int:
        epoch, within = divmod(place, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([*self.seed, epoch]).permutation(self.count)
        return int(self._order[within])


class PromptReader:
    """The samples of a role whose latents nobody needs: prompts in turn, as `ShardReader` would give them."""

    def __init__(self, prompts: Sequence[str], count: int, size_ids: tuple[int, ...] | None) -> None:
        self.prompts, self.count, self.size_ids = list(prompts), count, size_ids

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> Sample:
        return Sample(torch.empty(0), self.prompts[position % len(self.prompts)], position, self.size_ids)


Reader = ShardReader | PromptReader


class ConceptStreams(Dataset[list[list[Sample]]]):
    """Item i is micro-batch i of this rank: the samples of each role. An anchor takes its sources in turn."""

    def __init__(self, readers: Mapping[str, Sequence[Reader]], layout: Layout, seed: int, concept: int) -> None:
        """`readers["anchor"]` lists the sources that share the anchor stream evenly; a role without sources has no stream."""
        self.layout = layout
        self.sources = [list(readers.get(role, ())) for role in ROLES]
        self.orders = [
            [GlobalOrder(len(reader), [seed, concept, r, i]) for i, reader in enumerate(of)]
            for r, of in enumerate(self.sources)
        ]

    def __getitem__(self, item: int) -> list[list[Sample]]:
        step, micro = divmod(item, self.layout.accumulate)
        places = [step * self.layout.batch + position for position in self.layout.positions(micro)]
        return [self._samples(role, places) for role in range(len(ROLES))]

    def alone(self, role: str) -> ConceptStreams:
        """These streams with no other role than this one."""
        only = copy(self)
        only.sources = [of if name == role else [] for name, of in zip(ROLES, self.sources)]
        return only

    def _samples(self, role: int, places: Sequence[int]) -> list[Sample]:
        sources, orders = self.sources[role], self.orders[role]
        chosen = []
        for place in places if sources else []:
            turn, source = divmod(place, len(sources))
            chosen.append(sources[source][orders[source][turn]])
        return chosen


def load(streams: ConceptStreams, items: range, workers: int) -> DataLoader[list[list[Sample]]]:
    """The items of the streams, in order, read by so many processes beside this one."""
    return DataLoader(
        streams,
        batch_size=None,
        sampler=items,
        num_workers=workers,
        collate_fn=_as_is,
        timeout=300 if workers else 0,
        worker_init_fn=_outlive_a_stop if workers else None,
    )


def micro_batches(
    streams: ConceptStreams,
    embed: Callable[[Sequence[str]], TextCond],
    prompts: ConceptPrompts,
    device: torch.device,
    first_step: int,
    steps: int,
    workers: int = 0,
) -> Iterator[ConceptBatch]:
    """This rank's micro-batches from step `first_step` on, `accumulate` per step.

    `prompts`: of the concept; sample i of a role has prompt i modulo their number, and its counterpart of the target, or of the
    superclass, is the one at that place.
    """
    items = range(first_step * streams.layout.accumulate, steps * streams.layout.accumulate)

    def conditions(samples: Sequence[Sample], texts: Sequence[str]) -> TextCond:
        cond = embed(texts)
        if cond.size_ids is None:
            return cond
        return replace(
            cond, size_ids=torch.tensor([sample.size_ids for sample in samples], dtype=torch.float32, device=device)
        )

    def counterparts(samples: Sequence[Sample], texts: Sequence[str]) -> TextCond:
        return conditions(samples, [texts[sample.key % len(texts)] for sample in samples])

    def stream(samples: Sequence[Sample]) -> Stream:
        texts = tuple(sample.prompt for sample in samples)
        latents = torch.stack([sample.latent for sample in samples]).to(device)  # [B, C, H, W]
        return Stream(latents, conditions(samples, texts), texts, tuple(sample.key for sample in samples))

    for target, superclass, anchor, distractor in load(streams, items, workers):
        yield ConceptBatch(
            stream(target),
            stream(superclass),
            stream(anchor) if anchor else None,
            counterparts(target, prompts.superclass),
            counterparts(superclass, prompts.target),
            stream(distractor) if distractor else None,
            counterparts(distractor, prompts.target) if distractor else None,
        )


class Draws:
    """Random numbers of one micro-batch, keyed by (seed, concept, step, place in the global batch, what for): not by rank."""

    def __init__(self, seed: int, concept: int, step: int, positions: Sequence[int], device: torch.device) -> None:
        self.key, self.positions, self.device = (seed, concept, step), list(positions), device

    def shared(self, what: str) -> float:
        """One uniform number in [0, 1) for the whole global batch."""
        return float(torch.rand((), generator=torch.Generator().manual_seed(derived_seed(*self.key, what))))

    def normal(self, what: str, shape: Sequence[int]) -> Tensor:
        """Unit normal [B, *shape]."""
        return torch.stack([torch.randn(*shape, generator=self._generator(what, p)) for p in self.positions]).to(
            self.device
        )

    def uniform(self, what: str) -> Tensor:
        """Uniform in [0, 1), [B]."""
        return torch.stack([torch.rand((), generator=self._generator(what, p)) for p in self.positions]).to(self.device)

    def _generator(self, what: str, position: int) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(*self.key, what, position))


def _outlive_a_stop(worker: int) -> None:
    """Launchers send a signal to the whole group of a rank's processes; the rank ends its workers itself, after the step and the save."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def _as_is(item: list[list[Sample]]) -> list[list[Sample]]:
    return item
