"""What an evaluation draws: every object in every style by templates, and the user's own prompts; each image by a seed of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from sculpt_dist.config.load import normal
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import derived_seed
from sculpt_dist.data.prompt_files import ListedPrompt, read_prompts
from sculpt_dist.data.prompts import fill


@dataclass(frozen=True)
class World:
    """What is evaluated: the objects, the styles, and which objects each superclass has."""

    objects: tuple[str, ...]
    styles: tuple[str, ...]  # empty where only objects are asked for
    members: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw: its prompt, what should be seen in it, and the seed of its noise."""

    prompt: str
    prompt_id: int
    paraphrased: bool
    object: int  # -1 where none is asked for
    style: int
    seed: int
    guidance: float
    shown: str | None  # file name under which it is kept, for the first image of each pair
    listed: bool = False  # a line of the user's file

    @property
    def judged(self) -> bool:
        """Whether the classifier is asked about it; an image of `evaluate.retain_prompts` counts for FID, KID and CLIPScore alone."""
        return self.object >= 0 or self.style >= 0


def evaluated_world(config: RunConfig) -> World:
    """Objects and styles from the configuration; the canvas's own where the canvas classifier judges and none are named."""
    settings = config.evaluate
    objects, styles, members = list(settings.objects), list(settings.styles), dict(settings.members)
    if settings.classifier == "canvas":
        from sculpt_dist.canvas import world

        objects = objects or list(world.OBJECTS)
        styles = styles or list(world.STYLES)
        members = members or {name: list(those) for name, those in world.SUPERCLASSES.items()}
    if not styles and any(concept.kind == "style" for concept in config.concepts):
        raise ConfigError(
            "evaluate.styles is empty: name the styles that a forgotten one is compared with, or evaluate.enabled=false"
        )
    for concept in config.concepts:
        of_kind = objects if concept.kind == "object" else styles
        if normal(concept.target) not in map(normal, of_kind):
            of_kind.append(concept.target)
        for name in concept.keep:
            if normal(name) not in map(normal, (*objects, *styles)):
                of_kind.append(name)
    if not objects:
        raise ConfigError(
            "evaluate.objects is empty and no concept is an object: name the objects to draw, or evaluate.enabled=false"
        )
    return World(tuple(objects), tuple(styles), {name: tuple(those) for name, those in members.items()})


def image_requests(config: RunConfig, world: World) -> list[ImageRequest]:
    """Every image of an evaluation, plain prompts first, in an order that depends on the configuration alone.

    Raises ConfigError for a file of prompts that cannot be read, or one of what is not evaluated.
    """
    settings, listed = config.evaluate, []
    templates = [(settings.prompt, settings.images)] + [
        (text, settings.paraphrase_images) for text in settings.paraphrases
    ]
    from_files = {normal(name) for name in settings.prompts or {}}
    prompt_id = 0
    for number, (template, images) in enumerate(templates):
        for o, name in enumerate(world.objects):
            for s, style in enumerate(world.styles or (None,)):
                if {normal(name), normal(style or "")} & from_files:
                    continue
                prompt = fill(template, object=name, style=style)
                for i in range(images):
                    seed = derived_seed(settings.seed, "evaluate", name, style or "", number, i)
                    shown = f"{name}--{style or 'none'}.png".replace("/", "-") if not number and not i else None
                    listed.append(
                        ImageRequest(
                            prompt, prompt_id, number > 0, o, s if style else -1, seed, settings.guidance, shown
                        )
                    )
                prompt_id += 1
    return listed + list(_listed_requests(config, world, prompt_id))


def _listed_requests(config: RunConfig, world: World, first_id: int) -> Iterator[ImageRequest]:
    """The images of the user's files of prompts, one for each line; equal prompts are one prompt to the bootstrap."""
    objects, styles = ([normal(name) for name in names] for names in (world.objects, world.styles))
    prompt_ids: dict[str, int] = {}

    def request(name: str, i: int, line: ListedPrompt, place: int, style: int, shown: str | None) -> ImageRequest:
        seed = derived_seed(config.evaluate.seed, "evaluate", name, "listed", i) if line.seed is None else line.seed
        guidance = config.evaluate.guidance if line.guidance is None else line.guidance
        return ImageRequest(
            line.prompt,
            prompt_ids.setdefault(line.prompt, first_id + len(prompt_ids)),
            False,
            place,
            style,
            seed,
            guidance,
            shown,
            True,
        )

    for name, file in (config.evaluate.prompts or {}).items():
        if normal(name) not in (*objects, *styles):
            there = ", ".join((*world.objects, *world.styles))
            raise ConfigError(f"evaluate.prompts names {name!r}, which is not evaluated; there are: {there}")
        place, style = ([*names, normal(name)].index(normal(name)) for names in (objects, styles))
        which = (place, -1) if place < len(objects) else (-1, style)
        shown = f"{name}--none.png" if place < len(objects) else f"none--{name}.png"
        for i, line in enumerate(read_prompts(file)):
            yield request(name, i, line, *which, None if i else shown.replace("/", "-"))
    for i, line in enumerate(read_prompts(config.evaluate.retain_prompts) if config.evaluate.retain_prompts else ()):
        yield request("", i, line, -1, -1, None)


def as_batches(wanted: Sequence[ImageRequest], size: int) -> list[list[ImageRequest]]:
    """Batches of at most `size`, in each of which one guidance is used, and all images are judged or none is, all listed or none."""

    def kind(request: ImageRequest) -> tuple[bool, bool, float]:
        return not request.judged, request.listed, request.guidance

    alike = [list(group) for _, group in groupby(sorted(wanted, key=kind), kind)]  # a stable order
    return [group[i : i + size] for group in alike for i in range(0, len(group), size)]
