"""Finds a world by its name, and what is shipped of it."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

import sculpt_dist.worlds
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.worlds.base import World

if TYPE_CHECKING:
    import numpy as np

DEFAULT_WORLD = "canvas"
ASSETS = Path(__file__).parents[1] / "assets"


def worlds() -> list[str]:
    """The names of all worlds: the folders of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(sculpt_dist.worlds.__path__) if module.ispkg)


def world(name: str) -> World:
    """A world by its name. Raises ConfigError, with the closest name, when there is none."""
    if name not in worlds():
        close = difflib.get_close_matches(name, worlds(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"model.world={name}: there is no such world.{hint} There are: {', '.join(worlds())}.")
    found: World = importlib.import_module(f"sculpt_dist.worlds.{name}.world").WORLD
    return found


def world_of(classifier: str | None) -> str | None:
    """The world that a value of `evaluate.classifier` belongs to; None where it is another kind of classifier."""
    kind = (DEFAULT_WORLD if classifier is None else classifier).partition(":")[0]
    return kind if kind in worlds() else None


def reference_images(name: str) -> np.ndarray:
    """A world's own images, uint8 [N, h, w, 3], with which FID and KID compare what a model draws."""
    images: np.ndarray = importlib.import_module(f"sculpt_dist.worlds.{name}.pictures").reference_images()
    return images


def shipped_classifier(classifier: str) -> Path:
    """The file of a world's classifier, from `evaluate.classifier` such as gallery:witness."""
    name, _, part = classifier.partition(":")
    return shipped(name, f"{part or 'classifier'}.safetensors")


def shipped(name: str, part: str) -> Path:
    """Where the package holds a part of a world: a kind of model, or a file."""
    return ASSETS / name / part
