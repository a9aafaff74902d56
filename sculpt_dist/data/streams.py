"""The streams of a concept, batch by batch: one integer of state, the same samples for any number of ranks and workers.

A method declares its streams (`StreamSpec`); each draws on one or several sources of samples. Sources by name:

    target, superclass    samples of the concept's own prompts
    keep                  samples of the concepts to keep
    earlier_targets       samples of every target before this concept, each a source of its own
    hold                  samples of the prompts that a run holds, the same for all its concepts
    anything else         samples of the names that `Method.extra_concepts` gives under it
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import derived_seed
from sculpt_dist.core.signals import STOPPING
from sculpt_dist.core.types import ConceptBatch, Stream, TextCond
from sculpt_dist.data.prompts import ConceptPrompts
from sculpt_dist.data.shards import Sample
from sculpt_dist.data.sources import LateSources, Reader

EARLIER_TARGETS = "earlier_targets"
HOLD = "hold"
ALONE = ("anchor", HOLD)  # roles whose prompts have no counterpart
ORDER = ("target", "superclass", "anchor", "distractor")  # the number that seeds a role's order; others get one by name


@dataclass(frozen=True)
class StreamSpec:
    """A stream that a method declares."""

    role: str
    """Its name in the batch."""
    sources: tuple[str, ...] | None = None
    """Sources that take turns in it; None means the one of the role's name. A source without samples is left out."""
    latents: bool = True
    """Whether the base model draws its samples; otherwise only prompts are streamed."""
    share: float = 1.0
    """Samples of a step, as a share of train.batch."""
    fixed: tuple[str, float] | None = None
    """(source, its share of the stream): the other sources take turns in the rest. None: all sources take turns, and so
    they do where concepts train together. Not for earlier targets."""

    @property
    def source_names(self) -> tuple[str, ...]:
        return (self.role,) if self.sources is None else self.sources


@dataclass(frozen=True)
class Layout:
    """How a global batch of `batch` samples is cut: micro-batch `a` of rank `r` is one consecutive slice."""

    batch: int
    ranks: int
    rank: int
    accumulate: int

    def positions(self, micro: int) -> range:
        """This rank's positions within the global batch."""
        size = self.batch // (self.ranks * self.accumulate)
        first = (micro * self.ranks + self.rank) * size
        return range(first, first + size)

    def shared(self, spec: StreamSpec) -> Layout:
        """The layout of a stream with a share of the batch. Raises ConfigError where it is no whole number per rank."""
        batch, parts = self.batch * spec.share, self.ranks * self.accumulate
        if batch < 1 or batch % parts:
            raise ConfigError(
                f"train.batch={self.batch}: the stream {spec.role!r} takes {spec.share:g} of it, which {parts} parts "
                "(ranks x train.accumulate) cannot share evenly; use another batch"
            )
        return replace(self, batch=int(batch))


class GlobalOrder:
    """Which sample stands at each place of an endless stream: a fresh permutation per epoch, from the seed alone."""

    def __init__(self, count: int, seed: Sequence[int]) -> None:
        self.count, self.seed = count, list(seed)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, place: int) -> int:
        epoch, within = divmod(place, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([*self.seed, epoch]).permutation(self.count)
        return int(self._order[within])


def turn(place: int, sources: int, fixed: tuple[int, float] | None = None) -> tuple[int, int]:
    """(the source whose turn it is at a place of a stream, how many samples of that source came before).

    Sources take turns one by one. `fixed` gives one of them a share of all places, evenly spread, as long as there are
    others.
    """
    if fixed is None or sources == 1:
        before, source = divmod(place, sources)
        return source, before
    source, share = fixed
    before = int(place * share)
    if int((place + 1) * share) > before:
        return source, before
    others_before, other = divmod(place - before, sources - 1)
    return other + (other >= source), others_before


Item = dict[str, list[Sample]]  # the samples of a micro-batch by role


class ConceptStreams(Dataset[Item]):
    """Item i is micro-batch i of this rank. Several sources of a stream take turns (see `turn`)."""

    def __init__(
        self,
        readers: Mapping[str, Sequence[Reader] | LateSources],
        layout: Layout,
        seed: int,
        concept: int,
        layouts: Mapping[str, Layout] = {},
        fixed: Mapping[str, tuple[int, float]] = {},
    ) -> None:
        """`readers`: the sources of each role; a role without any has no stream. `layouts`: of roles with a share.

        `fixed`: for a role, the place of a source among its readers, and that source's share of the stream.
        """
        self.layout, self.layouts, self.fixed = layout, layouts, fixed
        self.sources = {role: sources for role, sources in readers.items() if len(sources)}
        self._seed = (seed, concept)
        self._orders: dict[tuple[str, int], GlobalOrder] = {}  # of the sources that had a turn

    def __getitem__(self, item: int) -> Item:
        step, micro = divmod(item, self.layout.accumulate)
        return {role: self._samples(role, step, micro) for role in self.sources}

    @property
    def most_samples(self) -> int:
        """The samples of the largest source whose prompts have counterparts."""
        return max((len(source) for role, sources in self.sources.items() if role not in ALONE for source in sources))

    def positions(self, role: str, micro: int) -> range:
        """This rank's positions within the global batch of a role."""
        return self.layouts.get(role, self.layout).positions(micro)

    def alone(self, role: str) -> ConceptStreams:
        """These streams with this role alone."""
        only = copy(self)
        only.sources = {role: self.sources[role]}
        return only

    def _samples(self, role: str, step: int, micro: int) -> list[Sample]:
        sources, chosen = self.sources[role], []
        for position in self.positions(role, micro):
            place = step * self.layouts.get(role, self.layout).batch + position
            source, before = turn(place, len(sources), self.fixed.get(role))
            chosen.append(sources[source][self._order(role, source)[before]])
        return chosen

    def _order(self, role: str, source: int) -> GlobalOrder:
        if (role, source) not in self._orders:
            count, seed = len(self.sources[role][source]), [*self._seed, _order_number(role), source]
            self._orders[role, source] = GlobalOrder(count, seed)
        return self._orders[role, source]


def _order_number(role: str) -> int:
    return ORDER.index(role) if role in ORDER else derived_seed(role)


def load(streams: ConceptStreams, items: range, workers: int) -> DataLoader[Item]:
    """The items of the streams, in order, read by `workers` processes beside this one."""
    return DataLoader(
        streams,
        batch_size=None,
        sampler=items,
        num_workers=workers,
        collate_fn=_as_is,
        timeout=300 if workers else 0,
        worker_init_fn=_ignore_stop_signals if workers else None,
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

    `prompts` are those of the concept. Sample i of a role has prompt i modulo their number; its counterpart is the
    superclass's prompt at that place (for the target's samples) or the target's (for all others).
    """
    items = range(first_step * streams.layout.accumulate, steps * streams.layout.accumulate)

    def conditions(samples: Sequence[Sample], texts: Sequence[str]) -> TextCond:
        cond = embed(texts)
        if cond.size_ids is None:
            return cond
        sizes = torch.tensor([sample.size_ids for sample in samples], dtype=torch.float32)  # [B, 6]
        return replace(cond, size_ids=sizes.to(device, non_blocking=True))

    def stream(role: str, samples: Sequence[Sample], micro: int) -> Stream:
        texts = tuple(sample.prompt for sample in samples)
        others = prompts.superclass if role == "target" else prompts.target
        counterparts = [others[sample.key % len(others)] for sample in samples]
        return Stream(
            latents=torch.stack([sample.latent for sample in samples]).to(device, non_blocking=True),  # [B, C, H, W]
            cond=conditions(samples, texts),
            prompts=texts,
            keys=tuple(sample.key for sample in samples),
            positions=tuple(streams.positions(role, micro)),
            counterpart=None if role in ALONE else conditions(samples, counterparts),
        )

    for roles, item in zip(load(streams, items, workers), items):  # the loader first: it must be read to its end
        micro = item % streams.layout.accumulate
        yield ConceptBatch({role: stream(role, samples, micro) for role, samples in roles.items()})


class Draws:
    """Random numbers of one micro-batch, keyed by (seed, concept, step, position in the global batch, purpose).

    They do not depend on the rank.
    """

    def __init__(self, seed: int, concept: int, step: int, positions: Sequence[int], device: torch.device) -> None:
        self.key, self.positions, self.device = (seed, concept, step), list(positions), device

    def at(self, positions: Sequence[int]) -> Draws:
        """The same draws for other places in the global batch, such as those of a stream with a share of it."""
        return Draws(*self.key, positions, self.device)

    def shared(self, what: str) -> float:
        """One uniform number in [0, 1) for the whole global batch."""
        return float(torch.rand((), generator=torch.Generator().manual_seed(derived_seed(*self.key, what))))

    def choice(self, what: str, count: int) -> list[int]:
        """A number below `count` for each position, [B], as plain numbers."""
        drawn = [torch.rand((), generator=self._generator(what, p), dtype=torch.float64) for p in self.positions]
        return [int(float(one) * count) for one in drawn]

    def normal(self, what: str, shape: Sequence[int]) -> Tensor:
        """Unit normal [B, *shape]."""
        drawn = [torch.randn(*shape, generator=self._generator(what, p)) for p in self.positions]
        return torch.stack(drawn).to(self.device, non_blocking=True)

    def uniform(self, what: str) -> Tensor:
        """Uniform in [0, 1), [B]."""
        drawn = [torch.rand((), generator=self._generator(what, p)) for p in self.positions]
        return torch.stack(drawn).to(self.device, non_blocking=True)

    def _generator(self, what: str, position: int) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(*self.key, what, position))


def _ignore_stop_signals(worker: int) -> None:
    """Launchers signal the whole process group of a rank; the rank ends its workers itself, after step and save."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def _as_is(item: Any) -> Any:  # an Item; DataLoader declares a list, which it passes only with a batch size
    return item
