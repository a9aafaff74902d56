"""The models of a pipeline folder, each loaded on first use."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sculpt_dist.backbones.io.folders import component_config, empty_component, load_component


class Components:
    """The models of one pipeline folder. On the meta device they are built from their settings, without weights."""

    def __init__(
        self,
        folder: Path,
        classes: Mapping[str, str],
        device: torch.device,
        dtype_of: Callable[[str], torch.dtype],
        on_put: Callable[[str, nn.Module], None],
    ) -> None:
        """`classes` maps each subfolder to a dotted class name; `on_put` is called with every model that is put in."""
        self.folder, self.classes, self.device = folder, classes, device
        self._dtype_of, self._on_put = dtype_of, on_put
        self._loaded: dict[str, nn.Module] = {}

    @property
    def loaded(self) -> frozenset[str]:
        """Names of the models that are in memory."""
        return frozenset(self._loaded)

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self.load(name, self._dtype_of(name))
        return self._loaded[name]

    def load(self, name: str, dtype: torch.dtype) -> None:
        """Load a model, its stored weights rounded once, to `dtype`. Raises ModelError for a damaged component."""
        load = empty_component if self.device.type == "meta" else load_component
        self.put(name, load(model_class(self.classes[name]), self.folder, name, dtype).to(self.device))

    def put(self, name: str, model: nn.Module) -> None:
        """Use `model` as this component from now on."""
        self._on_put(name, model)
        self._loaded[name] = model

    def release(self, names: Iterable[str]) -> None:
        """Free the memory of these models; the next use loads them again."""
        for name in names:
            self._loaded.pop(name, None)


def model_class(dotted: str) -> Any:
    """The class of a dotted name such as `diffusers.AutoencoderKL`. Importing diffusers' models takes seconds."""
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def forces_upcast(folder: Path, name: str, dotted: str) -> bool:
    """Whether an autoencoder asks for fp32 in place of fp16 (`force_upcast` of Stable Diffusion's and SDXL's)."""
    setting = inspect.signature(model_class(dotted)).parameters.get("force_upcast")
    return setting is not None and bool(component_config(folder, name).get("force_upcast", setting.default))
