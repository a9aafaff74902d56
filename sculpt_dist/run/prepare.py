"""The training data: the base model draws its own samples of every concept, or the user's images are encoded; then shards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.config.load import normal
from sculpt_dist.config.schema import Concept, RunConfig
from sculpt_dist.core.errors import ConfigError, ShardError
from sculpt_dist.core.files import derived_seed, file_sha256, text_sha256, write_atomically
from sculpt_dist.core.progress import progress
from sculpt_dist.data.images import IMAGE_TYPES, open_image
from sculpt_dist.data.prompts import ConceptPrompts, concept_prompts
from sculpt_dist.data.shards import Sample, ShardRecord, damage, read_index, write_index, write_shard
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.request import StopRequest
from sculpt_dist.methods.base import Method, Setup
from sculpt_dist.run.build import build_engine


@dataclass(frozen=True)
class StreamPlan:
    """How one stream of one concept is made; the recipe decides whether shards on the disk can be reused."""

    folder: Path
    label: str
    prompts: tuple[str, ...]  # sample i uses prompt i modulo their number
    negative: str
    count: int
    images: tuple[Path, ...]  # the user's own, instead of drawing

    def recipe(self, config: RunConfig, backbone: Backbone, drawn_in: torch.dtype, base: str) -> dict[str, Any]:
        drawn = {"steps": config.prepare.steps, "guidance": config.prepare.guidance, "seed": config.train.seed}
        own = {"images": text_sha256(" ".join(file_sha256(image) for image in self.images))}
        return {
            "base": base,
            "dtypes": [str(backbone.dtype), str(drawn_in)],
            "image": [backbone.image_size, backbone.size_ids and list(backbone.size_ids)],
            "label": self.label,
            "prompts": list(self.prompts),
            "negative": self.negative,
            "count": self.count,
            "batch": config.prepare.batch,
        } | (own if self.images else drawn)


def data_folder(run: Path, concept: Concept, role: str) -> Path:
    """Where the shards of one role of one concept lie; names that letters and digits cannot tell apart get a checksum."""
    name = normal(concept.target)
    plain = re.sub(r"[^a-z0-9]+", "-", name)
    unique = plain if plain.replace("-", " ") == name else f"{plain}-{text_sha256(name)[:8]}"
    return run / "data" / f"{concept.kind}-{unique}" / role


def drawn_prompts(run: Path, concept: Concept, role: str) -> tuple[str, ...]:
    """The prompts that the samples of a role were drawn with, in turn; none where there are no such samples."""
    folder = data_folder(run, concept, role)
    return tuple(read_index(folder)[0]["prompts"]) if (folder / "index.json").is_file() else ()


def prepared(
    config: RunConfig, method: Method, backbone: Backbone, base: str, run: Path, group: Group, stop: StopRequest
) -> tuple[Any, dict[str, str]]:
    """(the engine, where drawing needed it, else None; the checksum of each index): the samples of a run, made where they are missing.

    On stage 3 the engine comes first, and its sharded net draws: no rank ever holds the net whole.
    """
    engine = build_engine(config, method, backbone, group) if config.engine.stage == 3 else None
    return engine, prepare_samples(config, method, backbone, engine, base, run, group, stop)


def prepare_samples(
    config: RunConfig,
    method: Method,
    backbone: Backbone,
    engine: Any,
    base: str,
    run: Path,
    group: Group,
    stop: StopRequest,
) -> dict[str, str]:
    """Make what is missing of the prompt embeddings and of the shards of the method's roles; returns the checksum of each index.

    Every rank draws its share, in batches that do not depend on the number of ranks, each sample from noise of its own seed: with the
    engine's net, or where that is None with the backbone's, which is loaded only if something is missing.
    """
    hashes = {}
    everything = [concept_prompts(concept, config.prepare) for concept in config.concepts]
    setups = [Setup(i, backbone, config.train.steps, prompts, config.concepts) for i, prompts in enumerate(everything)]
    distractors = [
        prompts.of(group.on_first(lambda: list(method.distractors(setup))))  # noqa: B023 (called within this turn)
        for prompts, setup in zip(everything, setups)
    ]
    _embed_once(backbone, everything, distractors, base, run, group)
    for concept, prompts, others in zip(config.concepts, everything, distractors):
        for plan in _plans(config, method, concept, prompts, others, run):
            _make_stream(config, plan, backbone, engine, base, group, stop)
            hashes[str(plan.folder.relative_to(run))] = file_sha256(plan.folder / "index.json")
    return hashes


def _plans(
    config: RunConfig, method: Method, concept: Concept, prompts: ConceptPrompts, distractors: Sequence[str], run: Path
) -> list[StreamPlan]:
    known = {
        "target": (prompts.target, "", concept.target),
        "superclass": (prompts.superclass, prompts.negative, concept.superclass),
    }
    wanted = {role: known[role] for role in known if role in method.samples}
    if prompts.keep and "keep" in method.anchors:
        wanted["keep"] = (prompts.keep, "", None)
    if distractors:
        wanted["distractor"] = (tuple(distractors), "", None)
    plans = []
    for role, (texts, negative, name) in wanted.items():
        images = _own_images(config.prepare.images, name)
        count = len(images) or config.prepare.samples
        label = f"{concept.kind} {concept.target} {role}"
        plans.append(StreamPlan(data_folder(run, concept, role), label, texts, negative, count, images))
    return plans


def _own_images(folder: str | None, name: str | None) -> tuple[Path, ...]:
    if folder is None or name is None:
        return ()
    if not Path(folder).is_dir():
        raise ConfigError(
            f"prepare.images={folder}: there is no such folder; it should hold one subfolder of images per concept"
        )
    mine = Path(folder) / name
    if not mine.is_dir():
        return ()
    images = tuple(sorted(path for path in mine.iterdir() if path.suffix.lower() in IMAGE_TYPES))
    if not images:
        raise ConfigError(f"{mine}: holds no image ({', '.join(IMAGE_TYPES)}); add some or remove the folder")
    return images


def _make_stream(
    config: RunConfig, plan: StreamPlan, backbone: Backbone, engine: Any, base: str, group: Group, stop: StopRequest
) -> None:
    recipe = plan.recipe(config, backbone, backbone.dtype if engine is None else engine.dtype, base)
    starts = list(range(0, plan.count, config.prepare.batch))
    whole = group.from_first(_whole_shards(plan.folder, recipe) if group.is_first else None)
    todo = [start for start in starts if start not in whole]
    if group.from_first(not todo and _is_indexed(plan.folder, recipe, whole) if group.is_first else None):
        return
    plan.folder.mkdir(parents=True, exist_ok=True)
    for turn in progress(range(0, len(todo), group.size), f"prepare {plan.label}", group.is_first):
        stop.check(f"the samples of {plan.label}")
        mine = turn + group.rank
        start = todo[
            min(mine, len(todo) - 1)
        ]  # a sharded net needs all ranks in every forward: one without a batch draws one along
        ids = range(start, min(start + config.prepare.batch, plan.count))
        samples = group.together(lambda: _samples(config, plan, ids, backbone, engine))  # noqa: B023 (called within this turn)
        if mine < len(todo):
            name = f"{start // config.prepare.batch:05d}.tar"
            record = write_shard(plan.folder, name, samples)
            write_atomically(
                _note(plan.folder, name), json.dumps({"recipe": recipe, "record": asdict(record)}).encode()
            )
    stop.check(f"the samples of {plan.label}")
    if group.is_first:
        records = _whole_shards(plan.folder, recipe)
        missing = [start for start in starts if start not in records]
        if missing:
            raise ShardError(f"{plan.folder}: shards at samples {missing} did not arrive; call prepare again")
        for stray in plan.folder.glob("*.tar"):
            if stray.name not in {record.name for record in records.values()}:
                stray.unlink()
        write_index(plan.folder, recipe, records.values())
    group.barrier()


def _samples(config: RunConfig, plan: StreamPlan, ids: Sequence[int], backbone: Backbone, engine: Any) -> list[Sample]:
    prompts = [plan.prompts[i % len(plan.prompts)] for i in ids]
    if plan.images:
        latents, sizes = _encode(plan, ids, backbone)
    else:
        net = backbone.net if engine is None else engine.net
        latents, sizes = _draw(config, plan, ids, prompts, backbone, net), [backbone.size_ids] * len(ids)
    return [Sample(*sample) for sample in zip(latents, prompts, ids, sizes)]


def _is_indexed(folder: Path, recipe: Mapping[str, Any], whole: Mapping[int, ShardRecord]) -> bool:
    """Whether the index on the disk is of this recipe and of these very shards."""
    if not (folder / "index.json").is_file():
        return False
    try:
        found, records = read_index(folder)
    except ShardError:
        return False
    return found == recipe and records == [whole[first] for first in sorted(whole)]


def _whole_shards(folder: Path, recipe: Mapping[str, Any]) -> dict[int, ShardRecord]:
    """First sample id -> record, of the shards that were made by this recipe and are undamaged."""
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


def _note(folder: Path, name: str) -> Path:
    return folder / f".{name}.json"


def _draw(
    config: RunConfig, plan: StreamPlan, ids: Sequence[int], prompts: Sequence[str], backbone: Backbone, net: nn.Module
) -> Tensor:
    """Latents of samples drawn by the model, [len(ids), C, H, W]."""
    seeds = [derived_seed(config.train.seed, "prepare", plan.label, i) for i in ids]
    noise = torch.stack(
        [torch.randn(*backbone.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    negative = backbone.embed([plan.negative] * len(ids), negative=True)
    denoiser = backbone.denoiser(net)
    noise = noise.to(negative.tokens.device)
    return backbone.sample(
        denoiser, noise, backbone.embed(prompts), negative, config.prepare.steps, config.prepare.guidance
    )


def _encode(plan: StreamPlan, ids: Sequence[int], backbone: Backbone) -> tuple[Tensor, list[tuple[int, ...] | None]]:
    """Latents [len(ids), C, H, W] of the user's images, cut to a centred square and resized, and their size conditions."""
    images = [read_image(plan.images[i], backbone.image_size) for i in ids]
    latents = backbone.encode(torch.stack([pixels for pixels, _ in images]))
    return latents, [backbone.size_ids_of(*size) for _, size in images]


def read_image(path: Path, side: int) -> tuple[Tensor, tuple[int, int]]:
    """An image as [3, side, side] in [-1, 1], and the (height, width) it had. Raises ConfigError naming the file, as open_image does."""
    from PIL import Image, ImageOps

    image = open_image(path)
    square = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1, (image.height, image.width)


def _embed_once(
    backbone: Backbone,
    concepts: Sequence[ConceptPrompts],
    distractors: Sequence[Sequence[str]],
    base: str,
    run: Path,
    group: Group,
) -> None:
    """Prompt embeddings, computed by the first rank once and kept beside the shards; every rank then knows them, the same bits."""
    known = [text for concept in concepts for text in (*concept.target, *concept.superclass, *concept.keep)]
    prompts = list(dict.fromkeys([*known, *(text for texts in distractors for text in texts)]))
    negatives = list(dict.fromkeys(["", *(concept.negative for concept in concepts)]))
    file = run / "data" / "embeddings.safetensors"
    key = text_sha256(json.dumps([base, str(backbone.dtype), prompts, negatives]))

    def embed() -> None:
        if not backbone.read_embeddings(file, key):
            file.parent.mkdir(parents=True, exist_ok=True)
            backbone.write_embeddings(file, key, prompts, negatives)

    group.on_first(embed)
    if not group.is_first:
        backbone.read_embeddings(file, key)
