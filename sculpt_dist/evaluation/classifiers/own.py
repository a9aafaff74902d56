"""The user's own detector: `own:package.module:Class` names a subclass of `Classifier` (see base.py)."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sculpt_dist.core.errors import ConfigError, SculptError, StopRequested
from sculpt_dist.evaluation.classifiers.base import Classifier, Verdict, find_names, renumber


class Judge(Classifier):
    """Builds the user's class with the same arguments, checks its verdicts, and renumbers them for the evaluated names.

    A class that declares its own `objects` or `styles` answers with indices into those. Raises ConfigError when the
    class cannot be imported, is not a Classifier, or does not know a name that is evaluated.
    """

    def __init__(self, where: str, objects: Sequence[str], styles: Sequence[str]) -> None:
        self._spec = f"evaluate.classifier=own:{where}"
        with self._naming_the_class():
            self._detector = _find_class(where, self._spec)(where, objects, styles)
        super().__init__(where, objects, styles if self._detector.styles else ())
        self._wanted_objects = find_names("evaluate.objects", self.objects, self._detector.objects)
        self._wanted_styles = find_names("evaluate.styles", self.styles, self._detector.styles)

    def classify(self, images: Tensor) -> Verdict:
        """uint8 images [B, 3, h, w] -> Verdict. Raises ConfigError when the detector returns anything else."""
        with self._naming_the_class():
            verdict = self._detector.classify(images)
        if not isinstance(verdict, Verdict):
            raise ConfigError(f"{self._spec}: classify returned a {type(verdict).__name__}, expected a Verdict")
        num_objects, num_styles = len(self._detector.objects), len(self._detector.styles)
        self._check("objects", verdict.objects, len(images), num_objects)
        seen_objects = renumber(verdict.objects, self._wanted_objects, num_objects)
        if verdict.styles is None:
            return Verdict(seen_objects, None)
        self._check("styles", verdict.styles, len(images), num_styles)
        return Verdict(seen_objects, renumber(verdict.styles, self._wanted_styles, num_styles))

    @contextmanager
    def _naming_the_class(self) -> Iterator[None]:
        """Any error of the user's code becomes one line that names its class; the traceback goes to stderr."""
        try:
            yield
        except (SculptError, StopRequested, KeyboardInterrupt):
            raise
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            raise ConfigError(f"{self._spec}: your class failed with {type(error).__name__}: {error}") from error

    def _check(self, member: str, indices: Tensor, num_images: int, num_names: int) -> None:
        if indices.shape != (num_images,) or indices.dtype != torch.int64:
            raise ConfigError(
                f"{self._spec}: {member} are {indices.dtype} {list(indices.shape)}, "
                f"expected torch.int64 [{num_images}], one per image"
            )
        if num_images and not (int(indices.min()) >= -1 and int(indices.max()) < num_names):
            raise ConfigError(
                f"{self._spec}: {member} range from {int(indices.min())} to {int(indices.max())}, "
                f"expected -1 (none) to {num_names - 1}"
            )


def _find_class(where: str, spec: str) -> type[Classifier]:
    module_name, _, class_name = where.partition(":")
    if not all(word.isidentifier() for word in (*module_name.split("."), class_name)):
        raise ConfigError(f"{spec}: write own:package.module:Class")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{spec}: cannot import {module_name} ({error}): install it, or add its folder to PYTHONPATH"
        ) from error
    found = vars(module).get(class_name)
    if found is None:
        raise ConfigError(f"{spec}: {module_name} has no {class_name}")
    if not (isinstance(found, type) and issubclass(found, Classifier)):
        raise ConfigError(
            f"{spec}: {class_name} is not a subclass of sculpt_dist.evaluation.classifiers.base.Classifier: make it one"
        )
    return found
