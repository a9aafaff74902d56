"""What a classifier is, and how `evaluate.classifier=KIND:WHERE` finds one.

Every other file of this folder is one kind of classifier, named after the file; its class `Judge` is a `Classifier`.
"""

from __future__ import annotations

import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt_dist.config.checks import normal
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.messages import shortlist
from sculpt_dist.core.plugins import plugins
from sculpt_dist.worlds.find import DEFAULT_WORLD

PACKAGE = "sculpt_dist.evaluation.classifiers"


@dataclass(frozen=True)
class Verdict:
    """What was recognised, as indices into the classifier's `objects` and `styles`; -1 means "none of them"."""

    objects: Tensor  # [B] int64
    styles: Tensor | None  # [B] int64; None when the classifier knows no styles


class Classifier(ABC):
    """Recognises objects in images, and styles if it can.

    Your own detector is a subclass; `evaluate.classifier=own:package.module:Class` names it.
    """

    objects: tuple[str, ...]
    styles: tuple[str, ...] = ()

    def __init__(self, where: str, objects: Sequence[str], styles: Sequence[str]) -> None:
        """`where` is the part of `evaluate.classifier` after the kind; `objects` and `styles` are those evaluated."""
        self.objects, self.styles = tuple(objects), tuple(styles)

    @abstractmethod
    def classify(self, images: Tensor) -> Verdict:
        """uint8 images [B, 3, h, w] -> Verdict."""


def load_classifier(spec: str | None, objects: Sequence[str], styles: Sequence[str]) -> Classifier:
    """The classifier of `evaluate.classifier`: that of a world (None: the default one), `clip:FOLDER`, `image:FOLDER`
    or `own:package.module:Class`.

    Raises ConfigError for an unknown kind or a name that the classifier does not know, and ModelError for a folder
    that cannot be used.
    """
    kind, _, where = (DEFAULT_WORLD if spec is None else spec).partition(":")
    if kind not in kinds():
        raise ConfigError(f"evaluate.classifier={spec}: no classifier {kind!r}. There are: {', '.join(kinds())}.")
    classifier: Classifier = importlib.import_module(f"{PACKAGE}.{kind}").Judge(where, objects, styles)
    return classifier


def kinds() -> tuple[str, ...]:
    """All kinds of classifiers in alphabetical order. Imports none of them."""
    return tuple(plugins(PACKAGE))


def find_names(key: str, wanted: Sequence[str], known: Sequence[str], listing: str = "") -> list[int]:
    """The index in `known` of each wanted name, ignoring case. Raises ConfigError that lists all unknown names.

    `listing`: the command that lists the known ones, where there is one.
    """
    index = {normal(name): i for i, name in enumerate(known)}
    unknown = [name for name in wanted if normal(name) not in index]
    if unknown:
        close = difflib.get_close_matches(normal(unknown[0]), list(index), n=3)
        hint = f" Closest to {unknown[0]!r}: {', '.join(close)}." if close else ""
        where = f" (`{listing}`)" if listing else ""
        raise ConfigError(
            f"{key}: the classifier does not know {', '.join(map(repr, unknown))}.{hint} "
            f"It knows: {', '.join(shortlist(known, 24)) or 'none'}{where}. Remove the unknown names, or choose "
            "another evaluate.classifier"
        )
    return [index[normal(name)] for name in wanted]


def renumber(recognised: Tensor, wanted: Sequence[int], num_classes: int) -> Tensor:
    """[B] indices among all classes of the classifier -> [B] int64 positions in `wanted`.

    -1 (none) stays -1; so becomes every class that is not wanted.
    """
    # one entry per class, and a last one that the index -1 finds
    positions = torch.full((num_classes + 1,), -1, dtype=torch.int64, device=recognised.device)
    for position, index in enumerate(wanted):
        positions[index] = position
    return positions[recognised]
