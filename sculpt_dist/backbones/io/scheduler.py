"""The noise scheduler of a pipeline folder, its settings checked before anything is computed from them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sculpt_dist.backbones.io.folders import read_json
from sculpt_dist.core.errors import ModelError

STOCHASTIC = ("Ancestral", "SDE", "sde", "LCM", "TCD", "DDPM", "SASolver")
MOST_TIMESTEPS = 10_000  # ten times those of any published model
SHIFTS = ("flow_shift", "shift")


def load_scheduler(folder: Path, forced: Mapping[str, Any]) -> Any:
    """The pipeline's own scheduler class and settings; `forced`: settings that the pipeline class overrides.

    Raises ModelError when the scheduler is missing, unknown, has impossible settings, or adds noise of its own.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise ModelError(f"{file}: the pipeline lacks its scheduler")
    settings = read_json(file)
    name = str(settings.get("_class_name", ""))
    kind = name + str(settings.get("algorithm_type"))
    if any(word in kind for word in STOCHASTIC) or settings.get("stochastic_sampling"):
        raise ModelError(
            f"{file}: {name} adds noise of its own, so equal seeds would not give equal images; save the pipeline with "
            "a deterministic scheduler such as DPMSolverMultistepScheduler"
        )
    scheduler = getattr(importlib.import_module("diffusers"), name, None)
    if scheduler is None or not name.endswith("Scheduler"):
        raise ModelError(f"{file}: _class_name {name!r} is no scheduler of diffusers")
    _check_settings(settings, file)
    try:
        loaded = scheduler.from_config(settings)
        return scheduler.from_config(
            loaded.config, **{key: value for key, value in forced.items() if key in loaded.config}
        )
    except (ValueError, TypeError, RuntimeError, KeyError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{file}: no {name} can be made of these settings ({reason}); fetch it again") from error


def _check_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Raises ModelError for a number of timesteps, a noise level or a shift that no model has."""

    def refuse(key: str, wanted: str) -> ModelError:
        return ModelError(f"{file}: {key}={str(settings[key])[:200]}: must be {wanted}; fetch it again")

    steps = settings.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= MOST_TIMESTEPS:
        raise refuse("num_train_timesteps", f"a whole number from 1 to {MOST_TIMESTEPS:,}")
    for key in ("beta_start", "beta_end"):
        if key in settings and not _is_between(settings[key], 0, 1):
            raise refuse(key, "a number between 0 and 1")
    betas = settings.get("trained_betas")
    if betas is not None and not (
        isinstance(betas, list) and len(betas) == steps and all(_is_between(beta, 0, 1) for beta in betas)
    ):
        raise refuse("trained_betas", f"a list of {steps} numbers between 0 and 1")
    for key in SHIFTS:
        if settings.get(key) is not None and not _is_between(settings[key], 0, 1000):
            raise refuse(key, "a number between 0 and 1,000")


def _is_between(value: Any, low: float, high: float) -> bool:
    """Whether it is a number above `low`, and at most `high`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low < value <= high
