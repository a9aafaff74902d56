"""A CLIP model as a judge: an image is what its nearest prompt names (zero-shot classification, Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.evaluation.classifiers.base import Classifier, Verdict, open_folder, read_model, read_part

OBJECT_PROMPT = "a photo of a {}"
STYLE_PROMPT = "an image in {} style"


class Encoder:
    """A CLIP model and its processor from a local folder, on whatever device the images are on. Raises ModelError."""

    def __init__(self, where: str | Path) -> None:
        folder = open_folder(where, files=["config.json"])
        # Without a vocabulary transformers makes up one of two tokens, and every prompt becomes the same.
        if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
            raise ModelError(f"{folder}: lacks tokenizer.json: save the model's CLIPTokenizer into this folder")
        self._model = read_model(CLIPModel, folder)
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
        """N prompts -> projected embeddings [N, D], not normalised; words beyond the text encoder's length are dropped."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(self._model.device)
        return self._model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output


class Judge(Classifier):
    """Picks the nearest of the asked objects, and of the asked styles, so it never answers -1. Raises ConfigError, ModelError."""

    def __init__(self, where: str, objects: Sequence[str], styles: Sequence[str]) -> None:
        super().__init__(where, objects, styles)
        for key, names in {"objects": self.objects, "styles": self.styles}.items():
            if len(names) == 1 or (key == "objects" and not names):
                raise ConfigError(
                    f"evaluate.{key} has {len(names)} names: CLIP names the nearest of several, so give at least 2 for it to choose from"
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
