"""What a classifier is, and how one is found by its spec `kind:where`: the kind is a file of this folder, which holds the class `Judge`."""

from __future__ import annotations

import difflib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from sculpt_dist.config.load import normal
from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.core.plugins import plugins

PACKAGE = "sculpt_dist.evaluation.classifiers"
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Verdict:
    """What was recognised: indices into the classifier's `objects` and `styles`; -1 says "none of them"."""

    objects: Tensor  # [B] int64
    styles: Tensor | None  # [B] int64; None where the classifier knows no styles


class Classifier(ABC):
    """Recognises objects, and styles if it can, in images. A user's own detector is a subclass, named `own:package.module:Class`."""

    objects: tuple[str, ...]
    styles: tuple[str, ...] = ()

    def __init__(self, where: str, objects: Sequence[str], styles: Sequence[str]) -> None:
        """`where` is what follows the kind in `evaluate.classifier=kind:where`; objects and styles are those evaluated."""
        self.objects, self.styles = tuple(objects), tuple(styles)

    @abstractmethod
    def classify(self, images: Tensor) -> Verdict:
        """uint8 images [B, 3, h, w] -> Verdict."""


def load_classifier(spec: str, objects: Sequence[str], styles: Sequence[str]) -> Classifier:
    """The classifier of `evaluate.classifier`: `canvas`, `clip:FOLDER`, `image:FOLDER` or `own:package.module:Class`.

    Raises ConfigError for an unknown kind or a name that the classifier does not know, ModelError for a folder that cannot be used.
    """
    kind, _, where = spec.partition(":")
    if kind not in kinds():
        raise ConfigError(f"evaluate.classifier={spec}: no classifier {kind!r}. There are: {', '.join(kinds())}.")
    return importlib.import_module(f"{PACKAGE}.{kind}").Judge(where, objects, styles)


def kinds() -> tuple[str, ...]:
    """The kinds that there are, in alphabetical order; none is imported for it."""
    return tuple(plugins(PACKAGE))


# What the kinds share.


def find_names(key: str, asked: Sequence[str], known: Sequence[str]) -> list[int]:
    """The index in `known` of every asked name, without regard to case. Raises ConfigError that names all unknown ones."""
    index = {normal(name): i for i, name in enumerate(known)}
    unknown = [name for name in asked if normal(name) not in index]
    if unknown:
        close = difflib.get_close_matches(normal(unknown[0]), list(index), n=3)
        hint = f" Closest to {unknown[0]!r}: {', '.join(close)}." if close else ""
        raise ConfigError(
            f"{key}: the classifier does not know {', '.join(map(repr, unknown))}.{hint} It knows: {', '.join(known) or 'none'}. "
            "Take them out, or choose another evaluate.classifier"
        )
    return [index[normal(name)] for name in asked]


def renumber(recognised: Tensor, wanted: Sequence[int], num_classes: int) -> Tensor:
    """[B] indices among all of the classifier's classes, -1 = none -> [B] int64 positions in `wanted`, -1 for what is not in it."""
    positions = torch.full(
        (num_classes + 1,), -1, dtype=torch.int64, device=recognised.device
    )  # the last entry answers -1
    for position, index in enumerate(wanted):
        positions[index] = position
    return positions[recognised]


def open_folder(where: str | Path, files: Sequence[str]) -> Path:
    """A model folder that holds these files. Raises ModelError when it, or one of them, is missing."""
    folder = Path(where).expanduser()
    if not str(where) or not folder.is_dir():
        raise ModelError(
            f"{str(where)!r}: no such model folder: give a local folder as transformers saves it; nothing is downloaded"
        )
    for file in files:
        if not (folder / file).is_file():
            raise ModelError(
                f"{folder}: lacks {file}: save the model and its processor into this folder with save_pretrained"
            )
    return folder


def read_part(from_pretrained: Callable[..., Loaded], folder: Path, **options: Any) -> Loaded:
    """Call a `from_pretrained` of transformers on local files only. Raises ModelError when they are damaged or of another kind."""
    damages = (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        ImportError,
        SafetensorError,
        StrictDataclassError,
    )
    try:
        return from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except damages as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{folder}: transformers cannot load it ({type(error).__name__}: {reason}): copy it again"
        ) from error


def read_model(model_class: Any, folder: Path) -> nn.Module:
    """The model of a folder in float32, frozen. Only safetensors are read, never a pickle, and no code of the folder is run.

    Raises ModelError, also when weights are missing, which transformers alone would fill with random numbers.
    """
    _check_weight_files(folder)
    loading = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    model, report = read_part(model_class.from_pretrained, folder, **loading)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder}: lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]}: "
            "the folder holds another kind of model, or a part of one; give the right one"
        )
    return model.eval().requires_grad_(False)


def _check_weight_files(folder: Path) -> None:
    """The weights are plain safetensors: transformers' `use_safetensors` still reads a pickle that an index or the config names."""
    if not (folder / "model.safetensors").is_file():
        index = folder / "model.safetensors.index.json"
        if not index.is_file():
            raise ModelError(
                f"{folder}: lacks model.safetensors: other weights are never read; save it again with save_pretrained"
            )
        weight_map = _read_json(index).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else [weight_map]
        foreign = [file for file in files if not str(file).endswith(".safetensors")]
        if foreign:
            raise ModelError(
                f"{index}: names {foreign[0]}, but only safetensors are read; save the model again with save_pretrained"
            )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: holds an adapter (adapter_config.json): merge it into the model and save that")
    if "transformers_weights" in _read_json(folder / "config.json"):
        raise ModelError(
            f"{folder}/config.json: names a weight file (transformers_weights): save the model again with save_pretrained"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ModelError(f"{file}: is no json ({error}): copy the folder again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds a {type(content).__name__}, expected named members: copy the folder again")
    return content
