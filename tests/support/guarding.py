"""Guards that are fitted to the canvas models in a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from harness import PROJECT

from sculpt_dist.config.load import load_config
from sculpt_dist.core.plugins import plugin
from sculpt_dist.data.prompts import concept_prompts
from sculpt_dist.guards import Fitting, write_guard
from sculpt_dist.methods.base import load_method

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas"
OPTIONS: dict[str, list[str]] = {  # what makes a guard act strongly, or be fitted quickly
    "sld": ["method.level=max"],
    "saeuron": ["method.expansion=4", "method.active=4", "method.epochs=1", "method.percentile=90"],
}
QUICK = ["prepare.samples=4", "prepare.steps=4", "prepare.batch=4", "prepare.guidance=3"]
CONCEPTS = "concepts=[{target: bird, superclass: animal},{target: boat, superclass: vehicle}]"


def backbone_of(arch: str, folder: Path | None = None) -> Any:
    kind = plugin("sculpt_dist.backbones", arch, "model.arch").Backbone
    return kind(folder or ASSETS / arch, torch.float32, torch.device("cpu"))


def fitted(name: str, arch: str, folder: Path, *overrides: str) -> Path:
    """A guard against birds and boats, fitted to the canvas model of this kind and written into the folder."""
    world = PROJECT / "configs" / "canvas" / "world.yaml"
    config = load_config(world, [f"method.name={name}", CONCEPTS, *QUICK, *OPTIONS.get(name, []), *overrides])
    prompts = [concept_prompts(concept, config.prepare) for concept in config.concepts]
    guard, backbone = load_method(config.method), backbone_of(arch)
    with torch.no_grad():
        tensors = guard.fit(Fitting(backbone, prompts, config.prepare, seed=0))
    write_guard(folder, guard, tensors, backbone.net, {"targets": ["bird", "boat"]})
    return folder
