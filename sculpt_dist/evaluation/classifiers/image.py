"""An image classifier of transformers, which knows the names in its label map, such as ImageNet's."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from sculpt_dist.config.checks import normal
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.evaluation.classifiers.base import Classifier, Verdict, renumber
from sculpt_dist.evaluation.model_folders import open_folder, read_model, read_part

# ImageNet-1k class indices. Label maps spell these names differently (chain saw, chainsaw); the index never changes.
IMAGENETTE = {
    "tench": 0,
    "english springer": 217,
    "cassette player": 482,
    "chain saw": 491,
    "church": 497,
    "french horn": 566,
    "garbage truck": 569,
    "gas pump": 571,
    "golf ball": 574,
    "parachute": 701,
}


class Judge(Classifier):
    """Names objects by the most probable label and knows no styles.

    Raises ConfigError for an object without a label, and ModelError for a folder that cannot be used.
    """

    def __init__(self, where: str, objects: Sequence[str], styles: Sequence[str]) -> None:
        super().__init__(where, objects, ())
        folder = open_folder(where, files=["config.json"])
        self._model = read_model(AutoModelForImageClassification.from_pretrained, folder)
        self._processor = read_part(AutoImageProcessor.from_pretrained, folder, backend="pil")
        self._wanted = find_classes(self.objects, self._model.config.id2label)

    @torch.no_grad()
    def classify(self, images: Tensor) -> Verdict:
        """uint8 images [B, 3, h, w] of any size -> Verdict; labels that are not evaluated count as -1."""
        prepared = self._processor(images=list(images.cpu()), input_data_format="channels_first", return_tensors="pt")
        pixels = prepared["pixel_values"].to(images.device)  # [B, 3, size, size]
        logits = self._model.to(images.device)(pixel_values=pixels).logits  # [B, num_labels]
        return Verdict(renumber(logits.argmax(1), self._wanted, logits.shape[1]), None)


def find_classes(objects: Sequence[str], labels: Mapping[int, str]) -> list[int]:
    """The class index of each object. A label lists synonyms, such as "tench, Tinca tinca"; case is ignored.

    In a model with the 1000 ImageNet labels, Imagenette's names are found by class index. Raises ConfigError for an
    object that no label or several labels name, and for two objects with the same label.
    """
    is_imagenet = len(labels) == 1000 and "tench" in _synonyms(labels[0])
    classes: dict[int, str] = {}
    for name in objects:
        index = IMAGENETTE[normal(name)] if is_imagenet and normal(name) in IMAGENETTE else _find_class(name, labels)
        if index in classes:
            raise ConfigError(
                f"evaluate.objects: {classes[index]!r} and {name!r} both name the label {labels[index]!r}: keep one"
            )
        classes[index] = name
    return list(classes)


def _find_class(name: str, labels: Mapping[int, str]) -> int:
    exact = [i for i, label in labels.items() if _plain(label) == _plain(name)]
    found = exact or [i for i, label in labels.items() if _plain(name) in _synonyms(label)]
    if len(found) == 1:
        return found[0]
    if found:
        several = "; ".join(labels[i] for i in found)
        raise ConfigError(
            f"evaluate.objects: {name!r} is part of {len(found)} labels ({several}): write one label in full"
        )
    words = {word: label for label in labels.values() for word in _synonyms(label)}
    close = difflib.get_close_matches(_plain(name), list(words), n=3, cutoff=0)
    closest = "; ".join(dict.fromkeys(words[word] for word in close))
    raise ConfigError(
        f"evaluate.objects: no label of the classifier names {name!r}. The closest labels: {closest}. "
        "Spell the name as the label does, remove it, or choose another evaluate.classifier"
    )


def _synonyms(label: str) -> list[str]:
    return [_plain(part) for part in label.split(",")]


def _plain(name: str) -> str:
    return normal(name.replace("_", " "))
