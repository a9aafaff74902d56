"""The denoiser of a pipeline folder as it is stored: headers first, tensors on request."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from sculpt_dist.backbones.formats.original_names import plain_name
from sculpt_dist.backbones.io.folders import (
    DENOISERS,
    has_weights,
    is_named,
    pipeline_index,
    stored_weights,
    weight_files,
)
from sculpt_dist.backbones.io.tensorfile import PICKLED, entries, pickled
from sculpt_dist.core.errors import ModelError
from sculpt_dist.core.files import text_sha256
from sculpt_dist.core.tensorfile import LABELS, Entry, raw_bytes


class StoredNet:
    """The stored denoiser of a pipeline folder; its files stay mapped until the stack ends.

    `held` maps names to entries, `net[name]` reads one tensor. Raises ModelError when the folder is no pipeline with
    one denoiser, or its weights are missing, pickled, damaged or duplicated.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.pipeline, self.name = _pipeline_and_denoiser(folder)
        self.part = folder / self.name
        self.files = weight_files(self.part)
        if not self.files:
            refuse_pickles(self.part)
            raise ModelError(f"{self.part}: no .safetensors weights; fetch the component again")
        self.held: dict[str, Entry] = {}
        self._readers: dict[str, Any] = {}
        for file in self.files:
            found = entries(file)
            reader = stack.enter_context(safe_open(file, "pt"))
            for entry in found:
                if entry.name in self.held:
                    raise ModelError(
                        f"{file}: {entry.name} is also in another file of the folder; keep one set of weights in it"
                    )
                self.held[entry.name], self._readers[entry.name] = entry, reader

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name].get_tensor(name)

    def surroundings(self, changed: Container[str]) -> dict[str, str]:
        """The sha256 over what stays as it is beside the changed tensors: the rest of the denoiser, VAE, text encoders.

        Names, dtypes and bytes count, not the files that they lie in, nor how a library named or
        shaped them.
        """
        index = pipeline_index(self.folder)
        others = [part.name for part in self.folder.iterdir() if part.is_dir() and is_named(index, part.name)]
        others = sorted(name for name in others if name == "vae" or name.startswith("text_encoder"))
        found = {self.name: _over((name, self[name]) for name in self.held if name not in changed)}
        for part in others:
            stored = stored_weights(self.folder, part)
            found[part] = _over((plain_name(part, name), t) for name, t in stored if not name.endswith("position_ids"))
        return found


def sha256_of(tensor: Tensor) -> str:
    """Of the tensor's bytes."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def _over(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The sha256 over named tensors, in any order."""
    lines = [f"{name} {LABELS[tensor.dtype]} {sha256_of(tensor)}" for name, tensor in tensors]
    return text_sha256("\n".join(sorted(lines)))


def refuse_pickles(part: Path) -> None:
    """Raises ModelError when a component has pickled weights only: a copy without them would not load."""
    if not has_weights(part):
        for file in sorted(part.glob("*")):
            if file.suffix in PICKLED:
                raise pickled(file)


def _pipeline_and_denoiser(folder: Path) -> tuple[str, str]:
    """(class of the folder's pipeline, name of its denoiser)."""
    index = pipeline_index(folder)
    nets = [name for name in DENOISERS if is_named(index, name)]
    if len(nets) != 1:
        raise ModelError(
            f"{folder / 'model_index.json'}: names {' and '.join(nets) or 'no denoiser'}; deltas and adapters are "
            "made of pipelines with one unet or transformer"
        )
    return str(index.get("_class_name")), nets[0]
