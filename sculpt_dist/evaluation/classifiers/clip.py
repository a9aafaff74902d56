"""Zero-shot classification with a CLIP model: an image shows what its nearest prompt names.

Radford et al. 2021, arXiv 2103.00020.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.evaluation.classifiers.base import Classifier, Verdict
from sculpt_dist.evaluation.model_folders import open_folder, read_model, read_part

OBJECT_PROMPT = "a photo of a {}"
STYLE_PROMPT = "an image in {} style"


class Encoder:
    """A CLIP model and its processor from a local folder, on the device of the images. Raises ModelError."""

    def __init__(self, where: str | Path) -> None:
        folder = open_folder(where, files=["config.json"])
        # Without a vocabulary, transformers invents one of two tokens, and all prompts become the same.
        if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
            raise ModelError(f"{folder}: lacks tokenizer.json: save the model's CLIPTokenizer into this folder")
        self._model: Any = read_model(CLIPModel.from_pretrained, folder)
        self._processor = read_part(CLIPImageProcessorPil.from_pretrained, folder)
        self._tokenizer = read_part(CLIPTokenizer.from_pretrained, folder)

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, h, w] -> projected embeddings [B, D], not normalised."""
        prepared = self._processor(images=list(images.cpu()), input_data_format="channels_first", return_tensors="pt")
        pixels = prepared["pixel_values"].to(images.device)  # [B, 3, size, size]
        return self._model.to(images.device).get_image_features(pixel_values=pixels).pooler_output

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """N prompts -> projected embeddings [N, D], not normalised; prompts are truncated to the encoder's length."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(self._model.device)
        return self._model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output


class Judge(Classifier):
    """Picks the nearest of the evaluated objects and of the evaluated styles, so it never answers -1.

    Raises ConfigError when there are too few names to choose from, and ModelError for a folder that cannot be used.
    """

    def __init__(self, where: str, objects: Sequence[str], styles: Sequence[str]) -> None:
        super().__init__(where, objects, styles)
        for key, names in {"objects": self.objects, "styles": self.styles}.items():
            if len(names) == 1 or (key == "objects" and not names):
                raise ConfigError(
                    f"evaluate.{key} has {len(names)} names: CLIP picks the nearest of several names, so give at "
                    "least 2"
                )
        self._encoder = Encoder(where)
        self._object_prompts = self._directions(OBJECT_PROMPT, self.objects)  # [O, D]
        self._style_prompts = self._directions(STYLE_PROMPT, self.styles) if self.styles else None  # [S, D]

    def classify(self, images: Tensor) -> Verdict:
        """uint8 images [B, 3, h, w] of any size -> Verdict."""
        features = self._encoder.image_features(images)  # [B, D]
        seen_objects = (features @ self._object_prompts.to(features).T).argmax(1)
        if self._style_prompts is None:
            return Verdict(seen_objects, None)
        return Verdict(seen_objects, (features @ self._style_prompts.to(features).T).argmax(1))

    def _directions(self, template: str, names: Sequence[str]) -> Tensor:
        features = self._encoder.text_features([template.format(name) for name in names])  # [N, D]
        return features / features.norm(dim=1, keepdim=True)
