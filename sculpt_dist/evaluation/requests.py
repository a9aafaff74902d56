"""What an evaluation draws, resolved once from the configuration: the world, and a request for each image.

Images come from templates (every object in every style) and from the user's own prompt files. Each has its own seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby

from sculpt_dist.config.checks import normal
from sculpt_dist.config.schema import Concept, EvaluateConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import derived_seed, file_part, file_sha256, text_sha256
from sculpt_dist.data.prompt_files import ListedPrompt, read_prompts
from sculpt_dist.data.prompts import fill, naming
from sculpt_dist.worlds.find import DEFAULT_WORLD, shipped_classifier, world_of
from sculpt_dist.worlds.find import world as find_world

SCORING_KEYS = ("steps", "classifier", "reference", "clip", "metrics", "bootstrap")  # beside what the images come from


@dataclass(frozen=True)
class EvaluatedWorld:
    """The objects and styles to evaluate, and the objects that belong to each superclass."""

    objects: tuple[str, ...]
    styles: tuple[str, ...]  # empty when only objects are evaluated
    members: dict[str, tuple[str, ...]]
    held: tuple[str, ...] = ()  # objects that a prompt of `hold.prompts` names


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw: its prompt, what it should show, and the seed of its noise."""

    prompt: str
    prompt_id: int
    paraphrased: bool
    object: int  # index into the world's objects; -1 when the prompt asks for none
    style: int  # index into the world's styles; -1 when the prompt asks for none
    seed: int
    guidance: float
    shown: str | None  # file name of the first image of each pair, which reports show
    listed: bool = False  # the prompt comes from the user's file

    @property
    def judged(self) -> bool:
        """Whether the classifier sees the image. Images of `evaluate.retain_prompts` only count for the metrics."""
        return self.object >= 0 or self.style >= 0


@dataclass(frozen=True)
class Evaluation:
    """Everything that decides which images are drawn and how they are scored."""

    settings: EvaluateConfig
    concepts: tuple[Concept, ...]
    world: EvaluatedWorld
    most: int | None = None  # images; None for all
    shared: str | None = None  # the folder `prepare.folder`, which keeps the features of the reference images

    @cached_property
    def requests(self) -> tuple[ImageRequest, ...]:
        """The images to draw, in the order of `whole`. Raises ConfigError."""
        return self.whole if self.most is None else _subset(self.whole, self.most, self.settings.seed)

    @cached_property
    def whole(self) -> tuple[ImageRequest, ...]:
        """Every image, plain prompts first, in an order that depends only on the configuration.

        Raises ConfigError for a prompt file that cannot be read, or one for a name that is not evaluated.
        """
        settings, world = self.settings, self.world
        first_id = len(_templates(settings)) * len(_template_pairs(settings, world))
        found = (*_template_requests(settings, world), *_listed_requests(settings, world, first_id))
        if settings.without:
            self._check_left(found)
        return found

    def _check_left(self, requests: Sequence[ImageRequest]) -> None:
        """Raises ConfigError where `evaluate.without` leaves no image of a target."""
        for concept in self.concepts:
            is_object = concept.kind == "object"
            names = self.world.objects if is_object else self.world.styles
            asked = {names[i] for r in requests if (i := r.object if is_object else r.style) >= 0 and r.judged}
            if normal(concept.target) not in map(normal, asked):
                raise ConfigError(f"evaluate.without: leaves no image of {concept.target!r}; name fewer pairs")

    @cached_property
    def fingerprint(self) -> str:
        """A checksum over all of the configuration that decides the scores of a model, except `most`."""
        images = [
            (r.prompt, r.prompt_id, r.paraphrased, r.object, r.style, r.seed, r.guidance, r.listed) for r in self.whole
        ]
        settings = {name: getattr(self.settings, name) for name in SCORING_KEYS}
        judge, witness = self.settings.classifier, self.settings.witness
        if world_of(judge) not in (None, DEFAULT_WORLD):  # scores of the canvas, whose classifier stays, are older
            settings["weights"] = file_sha256(shipped_classifier(judge or ""))
        if witness is not None:
            weights = file_sha256(shipped_classifier(witness)) if world_of(witness) is not None else None
            settings["witness"] = [witness, weights]
        world = asdict(self.world)
        if not self.world.held:  # scores without held objects may be older than they
            del world["held"]
        return text_sha256(json.dumps([images, world, settings], sort_keys=True))

    def part(self, most: int | None) -> Evaluation:
        """The same with at most so many images, evenly of everything; None for all. Reads no prompt file again."""
        part = replace(self, most=most if most is not None and most < len(self.whole) else None)
        vars(part)["whole"] = self.whole
        return part

    def counts_for_metrics(self, request: ImageRequest) -> bool:
        """Whether the image counts for FID, KID and the other metrics.

        With `evaluate.retain_prompts` only the images of that file count; without it, all images of plain prompts do.
        """
        return not request.judged if self.settings.retain_prompts else not request.paraphrased


def resolve_evaluation(
    settings: EvaluateConfig, concepts: Sequence[Concept], held_prompts: Sequence[str] = ()
) -> Evaluation:
    """The evaluation of these concepts. Raises ConfigError when the settings name nothing to draw.

    Objects that one of `held_prompts` names are scored apart.
    """
    world = _resolve_world(settings, concepts)
    text = "\n".join(held_prompts)
    held = tuple(name for name in world.objects if naming(name).search(text))
    return Evaluation(settings, tuple(concepts), replace(world, held=held))


def as_batches(requests: Sequence[ImageRequest], size: int) -> list[list[ImageRequest]]:
    """Batches of at most `size` images.

    Within a batch all requests share the guidance, all or none are judged, and all or none are listed.
    """

    def kind(request: ImageRequest) -> tuple[bool, bool, float]:
        return not request.judged, request.listed, request.guidance

    alike = [list(group) for _, group in groupby(sorted(requests, key=kind), kind)]  # a stable order
    return [group[i : i + size] for group in alike for i in range(0, len(group), size)]


def _resolve_world(settings: EvaluateConfig, concepts: Sequence[Concept]) -> EvaluatedWorld:
    """The configured objects and styles, plus targets and concepts to keep.

    When the classifier of a world judges, that world supplies the objects, styles or members that are not configured.
    """
    objects, styles, members = list(settings.objects), list(settings.styles), dict(settings.members)
    name = world_of(settings.classifier)
    if name is not None:
        default = find_world(name)
        objects = objects or list(default.objects)
        styles = styles or list(default.styles)
        members = members or {name: list(names) for name, names in default.superclasses.items()}
    if not styles and any(concept.kind == "style" for concept in concepts):
        raise ConfigError(
            "evaluate.styles is empty: name the styles to compare a forgotten style with, or set evaluate.enabled=false"
        )
    known = {"object": set(map(normal, objects)), "style": set(map(normal, styles))}
    for concept in concepts:
        of_kind = objects if concept.kind == "object" else styles
        if normal(concept.target) not in known[concept.kind]:
            of_kind.append(concept.target)
            known[concept.kind].add(normal(concept.target))
        for name in concept.keep:
            if not any(normal(name) in names for names in known.values()):
                of_kind.append(name)
                known[concept.kind].add(normal(name))
    if not objects:
        raise ConfigError(
            "evaluate.objects is empty and no concept is an object: name the objects to draw, or set "
            "evaluate.enabled=false"
        )
    return EvaluatedWorld(tuple(objects), tuple(styles), {name: tuple(names) for name, names in members.items()})


def _template_requests(settings: EvaluateConfig, world: EvaluatedWorld) -> list[ImageRequest]:
    """The images of the plain template, then those of the paraphrases, for every pair without a prompt file."""
    pairs = _template_pairs(settings, world)
    requests = []
    for number, (template, num_images) in enumerate(_templates(settings)):
        for place, (object_index, style_index) in enumerate(pairs):
            name = world.objects[object_index]
            style = None if style_index == -1 else world.styles[style_index]
            prompt = fill(template, object=name, style=style)
            for i in range(num_images):
                request = ImageRequest(
                    prompt=prompt,
                    prompt_id=number * len(pairs) + place,
                    paraphrased=number > 0,
                    object=object_index,
                    style=style_index,
                    seed=derived_seed(settings.seed, "evaluate", name, style or "", number, i),
                    guidance=settings.guidance,
                    shown=image_name(name, style) if number == 0 and i == 0 else None,
                )
                requests.append(request)
    return requests


def _subset(requests: Sequence[ImageRequest], most: int, seed: int) -> tuple[ImageRequest, ...]:
    """At most so many requests, in their order: the shown ones, two without a name, and of the rest a seeded share.

    The share is the same of every object, style and kind of prompt. A smaller subset is a part of a larger one. Raises
    ConfigError where `most` is too small for the first two.
    """
    rng = random.Random(derived_seed(seed, "evaluate.subset"))
    strata: dict[tuple[int, int, bool], list[int]] = {}
    for i, request in enumerate(requests):
        strata.setdefault((request.object, request.style, request.paraphrased), []).append(i)
    order: list[tuple[float, int]] = []
    for members in strata.values():
        rng.shuffle(members)
        members.sort(key=lambda i: requests[i].shown is None)
        offset = rng.random()
        order += [((place + offset) / len(members), i) for place, i in enumerate(members)]
    order.sort()
    shown = [i for i, request in enumerate(requests) if request.shown is not None]
    needed = shown + [i for _, i in order if not requests[i].judged][:2]  # FID needs two
    if most < len(needed):
        raise ConfigError(
            f"evaluate.subset={most}: one image of every object and style, and two of evaluate.retain_prompts, are "
            f"{len(needed)}: give at least as many"
        )
    chosen = dict.fromkeys([*needed, *(i for _, i in order)])
    return tuple(requests[i] for i in sorted(list(chosen)[:most]))


def _templates(settings: EvaluateConfig) -> list[tuple[str, int]]:
    """Each template with its number of images per pair; the first is the plain one."""
    paraphrases = [(text, settings.paraphrase_images) for text in settings.paraphrases]
    return [(settings.prompt, settings.images), *paraphrases]


def _template_pairs(settings: EvaluateConfig, world: EvaluatedWorld) -> list[tuple[int, int]]:
    """(object, style) indices of the pairs drawn from templates; the style is -1 in a world without styles."""
    from_files = {normal(name) for name in settings.prompts or {}}
    objects = [i for i, name in enumerate(world.objects) if normal(name) not in from_files]
    styles = [i for i, name in enumerate(world.styles) if normal(name) not in from_files] if world.styles else [-1]
    left_out = set(_left_out(settings, world))
    return [pair for pair in ((i, j) for i in objects for j in styles) if pair not in left_out]


def _left_out(settings: EvaluateConfig, world: EvaluatedWorld) -> Iterator[tuple[int, int]]:
    """The pairs of `evaluate.without`. Raises ConfigError for one that names no object and style of the world."""
    objects, styles = ({normal(name): i for i, name in enumerate(names)} for names in (world.objects, world.styles))
    for pair in settings.without:
        name, style = map(normal, pair.rpartition("/")[::2])
        if name not in objects or style not in styles:
            raise ConfigError(f"evaluate.without={pair}: is not OBJECT/STYLE with an object and a style to evaluate")
        yield objects[name], styles[style]


def _listed_requests(settings: EvaluateConfig, world: EvaluatedWorld, first_id: int) -> Iterator[ImageRequest]:
    """One image per line of the user's prompt files. The bootstrap treats equal prompts as one prompt."""
    objects, styles = ([normal(name) for name in names] for names in (world.objects, world.styles))
    prompt_ids: dict[str, int] = {}

    def request(
        name: str, i: int, line: ListedPrompt, object_index: int, style: int, shown: str | None
    ) -> ImageRequest:
        return ImageRequest(
            prompt=line.prompt,
            prompt_id=prompt_ids.setdefault(line.prompt, first_id + len(prompt_ids)),
            paraphrased=False,
            object=object_index,
            style=style,
            seed=derived_seed(settings.seed, "evaluate", name, "listed", i) if line.seed is None else line.seed,
            guidance=settings.guidance if line.guidance is None else line.guidance,
            shown=shown,
            listed=True,
        )

    for name, file in (settings.prompts or {}).items():
        if normal(name) not in (*objects, *styles):
            names = ", ".join((*world.objects, *world.styles))
            raise ConfigError(f"evaluate.prompts names {name!r}, which is not evaluated; choose from: {names}")
        is_object = normal(name) in objects
        indices = (objects.index(normal(name)), -1) if is_object else (-1, styles.index(normal(name)))
        shown = image_name(name, None) if is_object else image_name(None, name)
        for i, line in enumerate(read_prompts(file)):
            yield request(name, i, line, *indices, None if i else shown)
    for i, line in enumerate(read_prompts(settings.retain_prompts) if settings.retain_prompts else ()):
        yield request("", i, line, -1, -1, None)


def image_name(name: str | None, style: str | None) -> str:
    """The file of the image of an object in a style."""
    return f"{file_part(name or 'none')}--{file_part(style or 'none')}.png"
