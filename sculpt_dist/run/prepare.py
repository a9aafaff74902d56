"""The training data: shards of samples that the base model draws, or of the user's own images, encoded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.config.checks import normal
from sculpt_dist.config.schema import Concept, PrepareConfig
from sculpt_dist.core.errors import NonFiniteError
from sculpt_dist.core.files import derived_seed, file_sha256, make_folder, text_sha256
from sculpt_dist.core.progress import progress
from sculpt_dist.data.images import own_images, read_image
from sculpt_dist.data.prompts import ConceptPrompts
from sculpt_dist.data.shards import Sample, read_index, write_shard
from sculpt_dist.data.streams import EARLIER_TARGETS, HOLD
from sculpt_dist.engine.group import Group
from sculpt_dist.methods.base import Method, Setup
from sculpt_dist.run.owned import keep_foreign_embeddings
from sculpt_dist.run.setup import RunSetup
from sculpt_dist.run.shard_notes import drawn_passes, index_shards, is_indexed, whole_shards, write_note
from sculpt_dist.run.store import Store

if TYPE_CHECKING:
    from sculpt_dist.engine.zero import Engine

FIRST = ("target", "superclass", "keep")  # sources in the order in which they are drawn; a method's own follow


@dataclass(frozen=True)
class SourcePlan:
    """How the samples of a source are made, of a concept or of the held prompts.

    The recipe decides whether shards can be reused.
    """

    folder: Path
    label: str
    prompts: tuple[str, ...]  # sample i uses prompt i modulo their number
    negative: str
    count: int
    images: tuple[Path, ...]  # the user's own, instead of drawing


Source = tuple[SourcePlan, dict[str, Any]]  # with its recipe


def data_folder(run: Path, concept: Concept, source: str) -> Path:
    """The shards of one source of one concept; a name with special characters gets a checksum."""
    name = normal(concept.target)
    plain = re.sub(r"[^a-z0-9]+", "-", name)
    is_plain = plain.replace("-", " ") == name and len(plain) <= 100
    unique = plain if is_plain else f"{plain[:100]}-{text_sha256(name)[:8]}"
    return run / "data" / f"{concept.kind}-{unique}" / source


def hold_folder(run: Path) -> Path:
    """The shards of the prompts that a run holds."""
    return run / "data" / "hold" / "prompts"


def drawn_prompts(run: Path, concept: Concept, source: str) -> tuple[str, ...]:
    """The prompts with which a source's samples were drawn, in rotation; empty if there are no such samples."""
    folder = data_folder(run, concept, source)
    return tuple(read_index(folder)[0]["prompts"]) if (folder / "index.json").is_file() else ()


def drawn_sources(method: Method) -> frozenset[str]:
    """The sources whose samples the base model draws for a method: those of streams with latents, and a method's own.

    An earlier target's samples are those of its own concept; those of held prompts are the run's.
    """
    found = set()
    for spec in method.streams():
        for source in spec.source_names:
            name = "target" if source == EARLIER_TARGETS else source
            if name != HOLD and (spec.latents or name not in FIRST):
                found.add(name)
    return frozenset(found)


def prepare_samples(
    setup: RunSetup, backbone: Backbone, engine: Engine | None, base: str, store: Store
) -> tuple[dict[str, str], int | None]:
    """Make what is missing of the prompt embeddings and of the method's samples.

    Returns each index's checksum, and how many passes all these samples took, in this session or before; None if an
    earlier version drew some of them. Every rank draws its share, in batches that do not depend on the number of ranks,
    each sample from noise of its own seed: with the engine's net, or without an engine with the backbone's, which is
    loaded only if something is missing. `base` is the base model's checksum. What the store has is taken from it, and
    what was drawn is kept there.
    """
    (method, _), group = setup.trained, store.group
    drawing = Drawing(setup.config.prepare, setup.config.train.seed, backbone, engine, base, store)
    updates = setup.config.train.steps
    setups = [Setup(i, backbone, updates, prompts, setup.concepts) for i, prompts in enumerate(setup.prompts)]
    extras = []
    for concept_setup in setups:
        names = group.on_first(lambda: dict(method.extra_concepts(concept_setup)))  # noqa: B023 (called at once)
        extras.append({source: concept_setup.prompts.of(members) for source, members in names.items()})
    _embed_once(backbone, setup, extras, base, group)
    if group.is_first:
        _name_images(setup.config.prepare, setup.concepts)
    plans = [
        plan
        for concept, prompts, extra in zip(setup.concepts, setup.prompts, extras)
        for plan in _plans(setup, drawn_sources(method), concept, prompts, extra)
    ]
    if setup.held:
        plans.append(SourcePlan(hold_folder(setup.folder), "hold", setup.held, "", len(setup.held), ()))
    passes = drawing.make(plans)
    return {str(p.folder.relative_to(setup.folder)): file_sha256(p.folder / "index.json") for p in plans}, passes


def _plans(
    setup: RunSetup,
    sources: frozenset[str],
    concept: Concept,
    prompts: ConceptPrompts,
    extra: Mapping[str, tuple[str, ...]],
) -> list[SourcePlan]:
    texts = {"target": prompts.target, "superclass": prompts.superclass, "keep": prompts.keep, **extra}
    prepare, plans = setup.config.prepare, []
    for source in [name for name in (*FIRST, *extra) if name in sources and texts[name]]:
        own = {"target": concept.target, "superclass": concept.superclass}.get(source)
        images = tuple(own_images(prepare.images, own)[0])
        plans.append(
            SourcePlan(
                folder=data_folder(setup.folder, concept, source),
                label=f"{concept.kind} {concept.target} {source}",
                prompts=tuple(texts[source]),
                negative=prompts.negative if source == "superclass" else "",
                count=len(images) or prepare.samples,
                images=images,
            )
        )
    return plans


def _name_images(prepare: PrepareConfig, concepts: Sequence[Concept]) -> None:
    """Say which of the user's files are used, and for which names the model draws."""
    if prepare.images is None:
        return
    for name in dict.fromkeys(name for concept in concepts for name in (concept.target, concept.superclass) if name):
        images, others = own_images(prepare.images, name)
        unread = f"; not read: {', '.join(path.name for path in others[:5])}" if others else ""
        used = f"{len(images)} of {len(images) + len(others)} files are images{unread}"
        print(f"{prepare.images}, {name}: {used if images else 'no folder, so the model draws'}", flush=True)


@dataclass(frozen=True)
class Drawing:
    """Draws, or encodes, the samples of a run on all ranks, and writes them as shards."""

    prepare: PrepareConfig
    seed: int
    backbone: Backbone
    engine: Engine | None
    base: str
    store: Store

    def make(self, plans: Sequence[SourcePlan]) -> int | None:
        """Make the shards that are missing or damaged, and the indices; all ranks enter.

        Returns the passes that all sources took, None if an earlier version drew some of them.
        """
        group = self.store.group
        recipes = [self.recipe(plan) for plan in plans]
        sources = list(zip(plans, recipes))
        made = group.on_first(lambda: [is_indexed(plan.folder, recipe) for plan, recipe in sources])
        todo = [source for source, is_made in zip(sources, made) if not is_made]
        if todo:
            with self.store.held("drawing", [self.base, self.seed]):
                self._draw_all([(p, recipe) for p, recipe in todo if not self.store.take("samples", recipe, p.folder)])
        passes = group.on_first(lambda: [drawn_passes(plan.folder, recipe) for plan, recipe in sources])
        return None if None in passes else sum(count or 0 for count in passes)

    def _draw_all(self, sources: Sequence[Source]) -> None:
        """Draw the shards of all sources in one queue, which the ranks share; then index and keep them."""
        group, batch = self.store.group, self.prepare.batch
        whole = group.on_first(lambda: [set(whole_shards(plan.folder, recipe)) for plan, recipe in sources])
        queue = [
            (plan, recipe, start)
            for (plan, recipe), starts in zip(sources, whole)
            for start in range(0, plan.count, batch)
            if start not in starts
        ]
        if queue:
            with nullcontext(self.backbone.net) if self.engine is None else self.engine.drawing() as net:
                self._draw_queue(queue, net)
        for plan, recipe in sources:
            group.on_first(lambda: index_shards(plan.folder, recipe, range(0, plan.count, batch)))  # noqa: B023
            self.store.keep("samples", recipe, plan.folder)

    def _draw_queue(self, queue: Sequence[tuple[SourcePlan, Mapping[str, Any], int]], net: nn.Module) -> None:
        group, stop = self.store.group, self.store.stop
        for first in progress(range(0, len(queue), group.size), "prepare samples", group.is_first):
            place = first + group.rank
            plan, recipe, start = queue[min(place, len(queue) - 1)]  # a sharded net needs all ranks in each forward
            stop.check(f"the samples of {queue[first][0].label}")
            ids = range(start, min(start + self.prepare.batch, plan.count))
            written = start if place < len(queue) else None
            group.together(lambda: self._make_shard(plan, recipe, ids, written, net))  # noqa: B023 (called at once)
        stop.check(f"the samples of {queue[-1][0].label}")

    def _make_shard(
        self, plan: SourcePlan, recipe: Mapping[str, Any], ids: Sequence[int], start: int | None, net: nn.Module
    ) -> None:
        """Draw samples, and write them unless `start` is None."""
        before = self.backbone.passes
        samples = self.samples(plan, ids, net)
        if start is not None:
            make_folder(plan.folder)
            record = write_shard(plan.folder, f"{start // self.prepare.batch:05d}.tar", samples)
            write_note(plan.folder, record, recipe, self.backbone.passes - before)

    def recipe(self, plan: SourcePlan) -> dict[str, Any]:
        """Everything that decides the samples of a source."""
        backbone = self.backbone
        drawn_in = backbone.dtype if self.engine is None else self.engine.dtype
        drawn = {"steps": self.prepare.steps, "guidance": self.prepare.guidance, "seed": self.seed}
        own = {"images": text_sha256(" ".join(file_sha256(image) for image in plan.images))}
        return {
            "base": self.base,
            "dtypes": [*backbone.frozen_dtypes, str(drawn_in)],
            "image": [backbone.image_size, backbone.size_ids and list(backbone.size_ids)],
            "label": plan.label,
            "prompts": list(plan.prompts),
            "negative": plan.negative,
            "count": plan.count,
            "batch": self.prepare.batch,
        } | (own if plan.images else drawn)

    def samples(self, plan: SourcePlan, ids: Sequence[int], net: nn.Module) -> list[Sample]:
        """The samples with these ids, drawn by the model or encoded from the user's images."""
        prompts = [plan.prompts[i % len(plan.prompts)] for i in ids]
        sizes: Sequence[tuple[int, ...] | None]
        if plan.images:
            latents, sizes = self._encode(plan, ids)
        else:
            latents, sizes = self._draw(plan, ids, prompts, net), [self.backbone.size_ids] * len(ids)
        if not bool(torch.isfinite(latents).all()):
            cause = "the model encodes" if plan.images else f"prepare.guidance={self.prepare.guidance:g} draws"
            raise NonFiniteError(
                f"the samples of {plan.label}: {cause} values that are not finite in {self.backbone.dtype}; choose "
                "another model.dtype, or a lower guidance"
            )
        return [Sample(*sample) for sample in zip(latents, prompts, ids, sizes)]

    def _draw(self, plan: SourcePlan, ids: Sequence[int], prompts: Sequence[str], net: nn.Module) -> Tensor:
        """Latents of samples drawn by the model, [len(ids), C, H, W]."""
        backbone, shape = self.backbone, self.backbone.latent_shape
        seeds = [derived_seed(self.seed, "prepare", plan.label, i) for i in ids]
        noise = torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        negative = backbone.embed([plan.negative] * len(ids), negative=True)
        denoiser = backbone.denoiser(net)
        noise, cond = noise.to(negative.tokens.device), backbone.embed(prompts)
        return backbone.sample(denoiser, noise, cond, negative, self.prepare.steps, self.prepare.guidance)

    def _encode(self, plan: SourcePlan, ids: Sequence[int]) -> tuple[Tensor, list[tuple[int, ...] | None]]:
        """Latents [len(ids), C, H, W] of the user's images, as resized centre crops, and size conditions."""
        images = [read_image(plan.images[i], self.backbone.image_size) for i in ids]
        latents = self.backbone.encode(torch.stack([pixels for pixels, _ in images]))
        return latents, [self.backbone.size_ids_of(*size) for _, size in images]


def _embed_once(
    backbone: Backbone,
    setup: RunSetup,
    extras: Sequence[Mapping[str, tuple[str, ...]]],
    base: str,
    group: Group,
) -> None:
    """Embed all prompts on the first rank and store them next to the shards; all ranks read the same bits."""
    concepts = setup.prompts
    known = [text for concept in concepts for text in (*concept.target, *concept.superclass, *concept.keep)]
    further = [text for extra in extras for texts in extra.values() for text in texts]
    prompts = list(dict.fromkeys([*known, *further, *setup.held]))
    negatives = list(dict.fromkeys(["", *(concept.negative for concept in concepts)]))
    file = setup.folder / "data" / "embeddings.safetensors"
    key = text_sha256(json.dumps([base, *backbone.frozen_dtypes, prompts, negatives]))

    def embed() -> None:
        if not backbone.read_embeddings(file, key):
            make_folder(file.parent)
            keep_foreign_embeddings(file)
            backbone.write_embeddings(file, key, prompts, negatives)

    group.on_first(embed)
    if not group.is_first:
        backbone.read_embeddings(file, key)
