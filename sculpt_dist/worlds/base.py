"""What a world is: objects in superclasses, styles, and captions, on which tiny models are trained and judged.

Every other folder of this package is one world; `model.world` in a config is its name. Its `world.py` holds `WORLD` and
imports nothing but this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

NUM_FORMS = 3  # ways to word a caption


@dataclass(frozen=True)
class ClassifierPlan:
    """The layers of a classifier, and how it is trained."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    layers: str = "plain"  # or "separable"
    steps: int = 500
    batch: int = 128
    rate: float = 3e-3


@dataclass(frozen=True)
class World:
    """Objects and styles with their names; every object may be drawn in every style."""

    superclasses: Mapping[str, tuple[str, ...]]
    styles: tuple[str, ...]
    image_size: int  # pixels, h = w
    nouns: tuple[str, str]  # what a caption calls an image, in forms 0 and 1
    # "classifier" judges; another one, such as "witness", may judge a second time.
    classifiers: Mapping[str, ClassifierPlan]
    per_pair: int  # images of each object in each style to train with
    size: str  # of the tiny models: see `Backbone.tiny`
    needs_sets: bool = False  # whether its images are made from sets of icons that must be given
    # How much more often a training caption names the superclass of a member, by kind of model; 1 where not listed.
    # Guidance pushes a superclass's samples away from the average image: with even captions, some members are hardly
    # ever drawn.
    lean: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @cached_property
    def objects(self) -> tuple[str, ...]:
        """All objects, class by class."""
        return tuple(name for members in self.superclasses.values() for name in members)

    @cached_property
    def superclass_of(self) -> dict[str, str]:
        """Object -> its superclass."""
        return {name: superclass for superclass, members in self.superclasses.items() for name in members}

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Every word of every caption, once; each becomes one token of the tiny models' tokenizers."""
        first, second = self.nouns
        return ("a", first, "of", "in", "style", second, "drawn", *self.objects, *self.superclasses, *self.styles)

    def prompt(self, name: str | None, style: str | None, form: int = 0) -> str:
        """The caption of an object or superclass in a style. A part that is None or "" is left out; without both: "".

        Form 0 is the wording used to forget a target. Forms 1 and 2 paraphrase it, to test whether the concept returns.
        """
        assert 0 <= form < NUM_FORMS, f"form {form} is not below {NUM_FORMS}"
        first, second = self.nouns
        if not name and not style:
            return ""
        if form == 0:
            start = f"a {first} of a {name}" if name else f"a {first}"
            return f"{start} in {style} style" if style else start
        if form == 1:
            start = f"a {style} {second}" if style else f"a {second}"
            return f"{start} of a {name}" if name else start
        return " ".join(part for part in (name, f"drawn in {style} style" if style else None) if part)
