"""A whole run on stage 3 in which a rank that loads the denoiser whole ends the run."""

from __future__ import annotations

import sys
from pathlib import Path

from sculpt_dist.backbones import base
from sculpt_dist.config.load import load_config
from sculpt_dist.run.sequence import run_sequence

load = base.load_component


def watched(kind, folder, name, dtype):
    assert name not in ("unet", "transformer"), f"{name} was loaded whole"
    return load(kind, folder, name, dtype)


base.load_component = watched
run_sequence(load_config(Path(sys.argv[1]), sys.argv[2:]))
