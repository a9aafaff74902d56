"""What a run checks first: its settings, and whether the parts of its model fit together, as shapes, without weights and without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.io.find import first_line
from sculpt_dist.backbones.io.folders import has_weights
from sculpt_dist.config.load import check_batch
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.data.prompts import ConceptPrompts, concept_prompts
from sculpt_dist.engine.zero import check_fit
from sculpt_dist.methods.base import Editor, Method
from sculpt_dist.run.build import build_backbone, build_method
from sculpt_dist.run.train import Plan, make_plan

META = torch.device("meta")
META_GROUP: Any = SimpleNamespace(device=META, on_first=lambda work: work())  # where a run has its group of ranks


def check_settings(config: RunConfig, ranks: int) -> tuple[list[ConceptPrompts], Method | Editor, Plan | None, int]:
    """The part of the check that looks at no model: (prompts of each concept, method, plan of its training, a rank's micro-batch).

    Raises ConfigError.
    """
    if ranks < 1:
        raise ConfigError(f"ranks={ranks}: must be at least 1")
    if not config.concepts:
        raise ConfigError(
            "concepts is empty: name at least one, for example 'concepts=[{target: cat, superclass: animal}]'"
        )
    prompts = [concept_prompts(concept, config.prepare) for concept in config.concepts]
    method = build_method(config)
    plan = None if isinstance(method, Editor) else make_plan(config, method)
    return prompts, method, plan, check_batch(config, ranks)


def check_model(config: RunConfig, folder: Path) -> None:
    """One prediction and one decoded image, as shapes, and the names and shapes of the denoiser's weights.

    Raises ModelError where the components of a pipeline folder do not fit together, or the weights are not those of the settings.
    """
    backbone = build_backbone(config, META_GROUP, path=str(folder))
    compare_stored(backbone, backbone.net)
    with as_model_error(f"{folder}, one prediction of {backbone.net_name} for one prompt"):
        cond = backbone.embed([""])
        noisy = torch.empty(1, *backbone.latent_shape, device=META)
        predicted = backbone.denoise(backbone.net, noisy, backbone.sample_time(torch.zeros(1)), cond)
    if predicted.shape != noisy.shape:
        raise ModelError(
            f"{folder / backbone.net_name}: predicts {list(predicted.shape)} for latents {list(noisy.shape)}"
        )
    check_decoding(backbone)


def compare_stored(backbone: Backbone, net: nn.Module) -> bool:
    """Whether there are weights of the net. Raises ModelError when their names or shapes are not those of its settings."""
    part = backbone.folder / backbone.net_name
    if not has_weights(part):
        return False
    stored = {entry.name: entry.shape for entry in backbone.stored_entries()}
    expected = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    check_fit(stored, expected, part)
    return True


def check_decoding(backbone: Backbone) -> list[int]:
    """[3, h, w] of a decoded latent."""
    with as_model_error(f"{backbone.folder / 'vae'}, decoding latents {list(backbone.latent_shape)}"):
        image = list(backbone.decode(torch.empty(1, *backbone.latent_shape, device=META)).shape[1:])
    if image != [3, backbone.image_size, backbone.image_size]:
        raise ModelError(
            f"{backbone.folder / 'vae'}: decodes latents {list(backbone.latent_shape)} to {image}, not to images of "
            f"{backbone.image_size} pixels: its config.json and the denoiser's are not of one model"
        )
    return image


@contextmanager
def as_model_error(where: str) -> Iterator[None]:
    """What the libraries say of shapes that do not fit becomes a ModelError that says where."""
    try:
        yield
    except (
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
    ) as error:  # diffusers' nets raise all of these for inputs that do not fit
        raise ModelError(f"{where}: {first_line(error)}; compare the sizes in the config.json of the parts") from error
