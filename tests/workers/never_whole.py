"""Runs `unlearn` in stage 3, and fails if any rank loads the whole denoiser."""

from __future__ import annotations

import sys
from pathlib import Path

from sculpt_dist.backbones.parts import components
from sculpt_dist.config.load import load_config
from sculpt_dist.run.sequence import run_sequence

load = components.load_component


def watched(kind, folder, name, dtype):
    assert name not in ("unet", "transformer"), f"{name} was loaded whole"
    return load(kind, folder, name, dtype)


components.load_component = watched
run_sequence(load_config(Path(sys.argv[1]), sys.argv[2:]))
