"""Components are imported, loaded and counted when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from harness import PROJECT

from sculpt_dist.backbones.sd15 import Backbone
from sculpt_dist.core.plugins import plugins

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas" / "sd15"


@pytest.mark.parametrize("arch", plugins("sculpt_dist.backbones"))
def test_importing_a_backbone_imports_no_models(arch):
    """Importing diffusers takes seconds, which a command with a wrong configuration need not spend."""
    code = (
        f"import sys, sculpt_dist.backbones.{arch}\n"
        "print([name for name in ('diffusers', 'transformers', 'peft') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert printed.stdout.strip() == "[]"


def test_opening_a_backbone_loads_nothing_and_passes_are_counted():
    backbone = Backbone(ASSETS, torch.float32, torch.device("cpu"))
    assert backbone.loaded == set()
    cond = backbone.embed(["a cat", "a dog"])
    noisy = torch.zeros(2, *backbone.latent_shape)
    backbone.denoise(backbone.net, noisy, torch.tensor([1, 2]), cond)
    assert backbone.passes == 2 and backbone.loaded == {"text_encoder", "unet"}
    backbone.denoise(backbone.net.requires_grad_(True), noisy, torch.tensor([1, 2]), cond)
    assert backbone.passes == 2 + 3 * 2  # a forward with gradient counts as three
