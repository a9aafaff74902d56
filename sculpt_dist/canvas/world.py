"""The canvas world: twelve objects in four superclasses, five styles, and their captions.

A small UnlearnCanvas (arXiv 2402.11846).
"""

from __future__ import annotations

# With fewer than three members, a superclass prompt draws the target in half of its images, and forgetting stalls.
SUPERCLASSES: dict[str, tuple[str, ...]] = {
    "animal": ("cat", "fish", "bird"),
    "plant": ("flower", "tree", "cactus"),
    "building": ("house", "tower", "bridge"),
    "vehicle": ("car", "boat", "rocket"),
}
OBJECTS: tuple[str, ...] = tuple(name for members in SUPERCLASSES.values() for name in members)
SUPERCLASS_OF: dict[str, str] = {name: superclass for superclass, members in SUPERCLASSES.items() for name in members}
STYLES: tuple[str, ...] = ("natural", "sketch", "neon", "popart", "mosaic")

NUM_FORMS = 3  # ways to word a caption
IMAGE_SIZE = 32  # pixels, h = w


def prompt(name: str | None, style: str | None, form: int = 0) -> str:
    """The caption of an object or superclass in a style. A part that is None or "" is left out; without both, it is "".

    Form 0 is the wording used to forget a target. Forms 1 and 2 paraphrase it, to test whether the concept comes back.
    """
    assert 0 <= form < NUM_FORMS, f"form {form} is not below {NUM_FORMS}"
    if not name and not style:
        return ""
    if form == 0:
        start = f"a photo of a {name}" if name else "a photo"
        return f"{start} in {style} style" if style else start
    if form == 1:
        start = f"a {style} picture" if style else "a picture"
        return f"{start} of a {name}" if name else start
    return " ".join(part for part in (name, f"drawn in {style} style" if style else None) if part)


WORDS: tuple[str, ...] = ("a", "photo", "of", "in", "style", "picture", "drawn", *OBJECTS, *SUPERCLASSES, *STYLES)
