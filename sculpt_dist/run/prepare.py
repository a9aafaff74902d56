"""The training data: shards of samples that the base model draws, or of the user's own images, encoded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.config.checks import normal
from sculpt_dist.config.schema import Concept, PrepareConfig
from sculpt_dist.core.errors import NonFiniteError, ShardError
from sculpt_dist.core.files import derived_seed, file_sha256, make_folder, text_sha256, write_atomically
from sculpt_dist.core.progress import progress
from sculpt_dist.data.images import own_images, read_image
from sculpt_dist.data.prompts import ConceptPrompts
from sculpt_dist.data.shards import Sample, ShardRecord, damage, read_index, write_index, write_shard
from sculpt_dist.data.streams import EARLIER_TARGETS
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.request import StopRequest
from sculpt_dist.methods.base import Method, Setup
from sculpt_dist.run.owned import is_shard, keep_foreign_embeddings
from sculpt_dist.run.setup import RunSetup

if TYPE_CHECKING:
    from sculpt_dist.engine.zero import Engine

FIRST = ("target", "superclass", "keep")  # sources in the order in which they are drawn; a method's own follow


@dataclass(frozen=True)
class SourcePlan:
    """How the samples of one source of one concept are made; the recipe decides whether shards can be reused."""

    folder: Path
    label: str
    prompts: tuple[str, ...]  # sample i uses prompt i modulo their number
    negative: str
    count: int
    images: tuple[Path, ...]  # the user's own, instead of drawing


def data_folder(run: Path, concept: Concept, source: str) -> Path:
    """The shards of one source of one concept; a name with special characters gets a checksum."""
    name = normal(concept.target)
    plain = re.sub(r"[^a-z0-9]+", "-", name)
    is_plain = plain.replace("-", " ") == name and len(plain) <= 100
    unique = plain if is_plain else f"{plain[:100]}-{text_sha256(name)[:8]}"
    return run / "data" / f"{concept.kind}-{unique}" / source


def drawn_prompts(run: Path, concept: Concept, source: str) -> tuple[str, ...]:
    """The prompts with which a source's samples were drawn, in rotation; empty if there are no such samples."""
    folder = data_folder(run, concept, source)
    return tuple(read_index(folder)[0]["prompts"]) if (folder / "index.json").is_file() else ()


def drawn_sources(method: Method) -> frozenset[str]:
    """The sources whose samples the base model draws for a method: those of streams with latents, and a method's own.

    An earlier target's samples are those of its own concept.
    """
    found = set()
    for spec in method.streams():
        for source in spec.source_names:
            name = "target" if source == EARLIER_TARGETS else source
            if spec.latents or name not in FIRST:
                found.add(name)
    return frozenset(found)


def prepare_samples(
    setup: RunSetup, backbone: Backbone, engine: Engine | None, base: str, group: Group, stop: StopRequest
) -> dict[str, str]:
    """Make what is missing of the prompt embeddings and of the method's samples; returns each index's checksum.

    Every rank draws its share, in batches that do not depend on the number of ranks, each sample from noise of its own
    seed: with the engine's net, or without an engine with the backbone's, which is loaded only if something is missing.
    `base` is the base model's checksum.
    """
    method, _ = setup.trained
    drawing = Drawing(setup.config.prepare, setup.config.train.seed, backbone, engine, base, group, stop)
    updates = setup.config.train.steps
    setups = [Setup(i, backbone, updates, prompts, setup.concepts) for i, prompts in enumerate(setup.prompts)]
    extras = []
    for concept_setup in setups:
        names = group.on_first(lambda: dict(method.extra_concepts(concept_setup)))  # noqa: B023 (called at once)
        extras.append({source: concept_setup.prompts.of(members) for source, members in names.items()})
    _embed_once(backbone, setup.prompts, extras, base, setup.folder, group)
    if group.is_first:
        _name_images(setup.config.prepare, setup.concepts)
    checksums = {}
    for concept, prompts, extra in zip(setup.concepts, setup.prompts, extras):
        for plan in _plans(setup, drawn_sources(method), concept, prompts, extra):
            drawing.make(plan)
            checksums[str(plan.folder.relative_to(setup.folder))] = file_sha256(plan.folder / "index.json")
    return checksums


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
    group: Group
    stop: StopRequest

    def make(self, plan: SourcePlan) -> None:
        """Make the shards of one source that are missing or damaged, and its index; all ranks enter."""
        recipe, group = self.recipe(plan), self.group
        starts = list(range(0, plan.count, self.prepare.batch))
        whole: dict[int, ShardRecord] = group.from_first(_whole_shards(plan.folder, recipe) if group.is_first else {})
        todo = [start for start in starts if start not in whole]
        if group.from_first(not todo and _is_indexed(plan.folder, recipe, whole) if group.is_first else None):
            return
        group.together(lambda: make_folder(plan.folder))
        for first in progress(range(0, len(todo), group.size), f"prepare {plan.label}", group.is_first):
            self.stop.check(f"the samples of {plan.label}")
            place = first + group.rank
            start = todo[min(place, len(todo) - 1)]  # a sharded net needs all ranks, even those without a batch
            ids = range(start, min(start + self.prepare.batch, plan.count))
            written = start if place < len(todo) else None
            group.together(lambda: self._make_shard(plan, recipe, ids, written))  # noqa: B023 (called at once)
        self.stop.check(f"the samples of {plan.label}")
        group.on_first(lambda: _write_index(plan.folder, recipe, starts))

    def _make_shard(self, plan: SourcePlan, recipe: Mapping[str, Any], ids: Sequence[int], start: int | None) -> None:
        """Draw samples, and write them unless `start` is None."""
        samples = self.samples(plan, ids)
        if start is not None:
            name = f"{start // self.prepare.batch:05d}.tar"
            record = write_shard(plan.folder, name, samples)
            note = json.dumps({"recipe": recipe, "record": asdict(record)})
            write_atomically(plan.folder / f".{name}.json", note.encode())

    def recipe(self, plan: SourcePlan) -> dict[str, Any]:
        """Everything that decides the samples of a source."""
        backbone = self.backbone
        drawn_in = backbone.dtype if self.engine is None else self.engine.dtype
        drawn = {"steps": self.prepare.steps, "guidance": self.prepare.guidance, "seed": self.seed}
        own = {"images": text_sha256(" ".join(file_sha256(image) for image in plan.images))}
        return {
            "base": self.base,
            "dtypes": [str(backbone.dtype), str(drawn_in)],
            "image": [backbone.image_size, backbone.size_ids and list(backbone.size_ids)],
            "label": plan.label,
            "prompts": list(plan.prompts),
            "negative": plan.negative,
            "count": plan.count,
            "batch": self.prepare.batch,
        } | (own if plan.images else drawn)

    def samples(self, plan: SourcePlan, ids: Sequence[int]) -> list[Sample]:
        """The samples with these ids, drawn by the model or encoded from the user's images."""
        prompts = [plan.prompts[i % len(plan.prompts)] for i in ids]
        sizes: Sequence[tuple[int, ...] | None]
        if plan.images:
            latents, sizes = self._encode(plan, ids)
        else:
            latents, sizes = self._draw(plan, ids, prompts), [self.backbone.size_ids] * len(ids)
        if not bool(torch.isfinite(latents).all()):
            cause = "the model encodes" if plan.images else f"prepare.guidance={self.prepare.guidance:g} draws"
            raise NonFiniteError(
                f"the samples of {plan.label}: {cause} values that are not finite in {self.backbone.dtype}; choose "
                "another model.dtype, or a lower guidance"
            )
        return [Sample(*sample) for sample in zip(latents, prompts, ids, sizes)]

    def _draw(self, plan: SourcePlan, ids: Sequence[int], prompts: Sequence[str]) -> Tensor:
        """Latents of samples drawn by the model, [len(ids), C, H, W]."""
        backbone, shape = self.backbone, self.backbone.latent_shape
        seeds = [derived_seed(self.seed, "prepare", plan.label, i) for i in ids]
        noise = torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        negative = backbone.embed([plan.negative] * len(ids), negative=True)
        denoiser = backbone.denoiser(backbone.net if self.engine is None else self.engine.net)
        noise, cond = noise.to(negative.tokens.device), backbone.embed(prompts)
        return backbone.sample(denoiser, noise, cond, negative, self.prepare.steps, self.prepare.guidance)

    def _encode(self, plan: SourcePlan, ids: Sequence[int]) -> tuple[Tensor, list[tuple[int, ...] | None]]:
        """Latents [len(ids), C, H, W] of the user's images, as resized centre crops, and size conditions."""
        images = [read_image(plan.images[i], self.backbone.image_size) for i in ids]
        latents = self.backbone.encode(torch.stack([pixels for pixels, _ in images]))
        return latents, [self.backbone.size_ids_of(*size) for _, size in images]


def _is_indexed(folder: Path, recipe: Mapping[str, Any], whole: Mapping[int, ShardRecord]) -> bool:
    """Whether the index on disk is of this recipe and of exactly these shards."""
    if not (folder / "index.json").is_file():
        return False
    try:
        found, records = read_index(folder)
    except ShardError:
        return False
    return found == recipe and records == [whole[first] for first in sorted(whole)]


def _whole_shards(folder: Path, recipe: Mapping[str, Any]) -> dict[int, ShardRecord]:
    """First sample id -> record, of the undamaged shards that were made by this recipe."""
    whole = {}
    for note in sorted(folder.glob(".*.tar.json")):
        try:
            content = json.loads(note.read_bytes())
            record = ShardRecord(**content["record"])
        except (ValueError, KeyError, TypeError):
            continue
        if content["recipe"] == recipe and damage(folder, record) is None:
            whole[record.first] = record
    return whole


def _write_index(folder: Path, recipe: Mapping[str, Any], starts: Sequence[int]) -> None:
    """Index the shards and remove stray files. Raises ShardError when shards of other ranks are missing."""
    records = _whole_shards(folder, recipe)
    missing = [start for start in starts if start not in records]
    if missing:
        raise ShardError(f"{folder}: shards at samples {missing} are missing; call prepare again")
    known = {record.name for record in records.values()}
    for stray in folder.glob("*.tar"):
        if stray.name not in known and is_shard(stray):
            stray.unlink()
    write_index(folder, recipe, records.values())


def _embed_once(
    backbone: Backbone,
    concepts: Sequence[ConceptPrompts],
    extras: Sequence[Mapping[str, tuple[str, ...]]],
    base: str,
    run: Path,
    group: Group,
) -> None:
    """Embed all prompts on the first rank and store them next to the shards; all ranks read the same bits."""
    known = [text for concept in concepts for text in (*concept.target, *concept.superclass, *concept.keep)]
    further = [text for extra in extras for texts in extra.values() for text in texts]
    prompts = list(dict.fromkeys([*known, *further]))
    negatives = list(dict.fromkeys(["", *(concept.negative for concept in concepts)]))
    file = run / "data" / "embeddings.safetensors"
    key = text_sha256(json.dumps([base, str(backbone.dtype), prompts, negatives]))

    def embed() -> None:
        if not backbone.read_embeddings(file, key):
            make_folder(file.parent)
            keep_foreign_embeddings(file)
            backbone.write_embeddings(file, key, prompts, negatives)

    group.on_first(embed)
    if not group.is_first:
        backbone.read_embeddings(file, key)
