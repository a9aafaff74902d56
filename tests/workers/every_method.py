"""Runs several methods one after another in this process, each into FOLDER/<method>, and tries an attack on each.

FOLDER ARCH METHODS OVERRIDES..., where METHODS are names with commas between them. No report is written, which would
take longer than the rest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from harness import PROJECT, TINY_RUN

from sculpt_dist.config.load import load_config
from sculpt_dist.run import sequence

sequence.write_report_and_card = lambda folder, backbone: None
sequence.read_report = lambda folder: {}

folder, arch, methods, *overrides = sys.argv[1:]
for method in methods.split(","):
    settings = [
        *TINY_RUN,
        "evaluate.enabled=false",
        "evaluate.attacks=[plain]",
        "attack.cases=1",
        f"model.arch={arch}",
        f"prepare.folder={folder}/shared",
        f"run.folder={folder}/{method}",
        *overrides,
    ]
    sequence.run_sequence(load_config(PROJECT / "configs" / "canvas" / f"{method}.yaml", settings))
    assert set(json.loads((Path(folder) / method / "attacks" / "attacks.json").read_text())["attacks"]) == {"plain"}
