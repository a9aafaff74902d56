"""sculpt-dist: make a text-to-image diffusion model forget concepts, at scale and with evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping, Sequence

if TYPE_CHECKING:
    from sculpt_dist.sequence import Run

__version__ = "0.1.0"


def unlearn(
    model: str | None = None,
    method: str | Mapping[str, Any] = "dm_cal",
    concepts: Sequence[Mapping[str, Any]] = (),
    config: str | None = None,
    **overrides: Any,
) -> Run:
    """Unlearn `concepts`, one after another, from the pipeline folder `model`, and return the finished run.

    `model`: a diffusers folder or hub id; None is the shipped canvas model. `method`: a name, or a mapping with its options.
    `concepts`: mappings such as {"target": "tench", "superclass": "fish"}. `config`: a yaml file to start from. `overrides`: sections
    as mappings (train={"lr": 1e-5}) or dotted keys through ** ({"train.lr": 1e-5}). Called again with the same arguments it goes on
    where it stopped. Under torchrun every rank calls it. Raises SculptError with what to mend.
    """
    from pathlib import Path

    from omegaconf import OmegaConf

    from sculpt_dist.config import load_config
    from sculpt_dist.sequence import run_sequence

    given = OmegaConf.create({"method": {"name": method} if isinstance(method, str) else dict(method)})
    if model is not None:
        OmegaConf.update(given, "model.path", str(model), force_add=True)
    if concepts:
        OmegaConf.update(given, "concepts", [dict(concept) for concept in concepts], force_add=True)
    for key, value in overrides.items():
        OmegaConf.update(given, key, value, force_add=True)
    return run_sequence(load_config(Path(config) if config else None, given))
