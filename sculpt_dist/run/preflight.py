"""The first check of a run: whether the shapes of the model's parts fit together, without weights or a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sculpt_dist.backbones.io.find import first_line
from sculpt_dist.backbones.io.folders import has_weights
from sculpt_dist.config.schema import ModelConfig
from sculpt_dist.core.errors import ModelError
from sculpt_dist.engine.zero import check_fit
from sculpt_dist.run.model import open_backbone

if TYPE_CHECKING:
    from sculpt_dist.backbones.base import Backbone

META = torch.device("meta")
META_GROUP: Any = SimpleNamespace(device=META, on_first=lambda work: work())  # in place of a group of ranks


def check_model(model: ModelConfig, folder: Path) -> None:
    """Try one prediction and one decoded image as shapes, and compare the names and shapes of the denoiser's weights.

    Raises ModelError where the components of a pipeline folder do not fit together, or the weights do not match the
    settings.
    """
    backbone = open_backbone(model, META_GROUP, folder, folder)
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
    """Whether weights of the net are there. Raises ModelError when their names or shapes do not match its settings."""
    part = backbone.folder / backbone.net_name
    if not has_weights(part):
        return False
    stored = {entry.name: entry.shape for entry in backbone.stored_entries()}
    expected = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    check_fit(stored, expected, part)
    return True


def check_decoding(backbone: Backbone) -> list[int]:
    """[3, h, w] of a decoded latent. Raises ModelError where it is not the image size."""
    latents = list(backbone.latent_shape)
    with as_model_error(f"{backbone.folder / 'vae'}, decoding latents {latents}"):
        image = list(backbone.decode(torch.empty(1, *latents, device=META)).shape[1:])
    if image != [3, backbone.image_size, backbone.image_size]:
        raise ModelError(
            f"{backbone.folder / 'vae'}: decodes latents {latents} to {image}, not to images of {backbone.image_size} "
            "pixels: its config.json and the denoiser's belong to different models"
        )
    return image


@contextmanager
def as_model_error(where: str) -> Iterator[None]:
    """Convert the libraries' errors about shapes that do not fit into a ModelError that names the place."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, KeyError) as error:  # diffusers' nets raise all of these
        raise ModelError(f"{where}: {first_line(error)}; compare the sizes in the config.json of the parts") from error
