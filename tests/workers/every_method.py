"""Runs several methods one after another in this process, each into FOLDER/<method>.

FOLDER ARCH METHODS OVERRIDES..., where METHODS are names with commas between them. Reports have no figures, which
would take longer than the rest.
"""

from __future__ import annotations

import sys

from harness import PROJECT, TINY_RUN

from sculpt_dist.config.load import load_config
from sculpt_dist.report import report
from sculpt_dist.run.sequence import run_sequence

report._draw_figures = lambda *arguments: {}

folder, arch, methods, *overrides = sys.argv[1:]
for method in methods.split(","):
    settings = [
        *TINY_RUN,
        "evaluate.enabled=false",
        f"model.arch={arch}",
        f"prepare.folder={folder}/shared",
        f"run.folder={folder}/{method}",
        *overrides,
    ]
    run_sequence(load_config(PROJECT / "configs" / "canvas" / f"{method}.yaml", settings))
