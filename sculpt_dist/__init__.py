"""sculpt-dist: make a text-to-image diffusion model forget concepts, at scale and with evidence."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sculpt_dist.run.sequence import Run

__version__ = "0.1.0"


def unlearn(
    model: str | None = None,
    method: str | Mapping[str, Any] | None = None,
    concepts: Sequence[Mapping[str, Any]] = (),
    config: str | None = None,
    **overrides: Any,
) -> Run:
    """Unlearn `concepts`, by default one after another, from the pipeline folder `model`, and return the finished run.

    `model`: a diffusers folder or hub id; None is the shipped model of `model.world`. `method`: a name, or a mapping
    with its options; None is dm_cal, or what `config` names.
    `concepts`: mappings such as {"target": "tench", "superclass": "fish"}. `config`: a yaml file to start from.
    `overrides`: sections as mappings (train={"lr": 1e-5}) or dotted keys through ** ({"train.lr": 1e-5}). Called again
    with the same arguments it goes on where it stopped. Under torchrun every rank calls it. Raises SculptError with
    what to mend.
    """
    from pathlib import Path

    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from sculpt_dist.config.load import load_config
    from sculpt_dist.core.errors import ConfigError
    from sculpt_dist.run.sequence import run_sequence

    if isinstance(concepts, str) or not all(isinstance(concept, Mapping) for concept in concepts):
        raise ConfigError(
            f"concepts={concepts!r}: give a list of mappings such as {{'target': 'tench', 'superclass': 'fish'}}"
        )
    given = OmegaConf.create({})
    values: dict[str, Any] = dict(overrides)
    if method is not None:
        values["method"] = {"name": method} if isinstance(method, str) else dict(method)
    if model is not None:
        values["model.path"] = str(model)
    if concepts:
        values["concepts"] = [dict(concept) for concept in concepts]
    for key, value in values.items():
        try:
            OmegaConf.update(given, key, _plain(value), force_add=True)
        except (OmegaConfBaseException, ValueError) as error:
            raise ConfigError(f"argument {key}={value!r}: {str(error).splitlines()[0]}") from error
    return run_sequence(load_config(Path(config) if config else None, given))


def _plain(value: Any) -> Any:
    """The value without numpy's numbers and arrays, and without Paths."""
    if isinstance(value, Mapping):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(member) for member in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value) if isinstance(value, os.PathLike) else value
