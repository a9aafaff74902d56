"""Runs `unlearn` again and again: `refusing_disk.py CONFIG OVERRIDES...`. At each attempt, the disk refuses one place.

The last attempt but one goes through; in the last one, the run folder of another run is deleted on the way.
Prints what each attempt says.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from pathlib import Path

from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import SculptError
from sculpt_dist.run.sequence import run_sequence

PLACES = (
    "config.yaml .lock log.txt embeddings.safetensors 00000.tar index.json images/ answers.json scores.json "
    "manifest.json metrics.jsonl costs.json /checkpoints CHECKSUMS model/ .model-written report.json "
    "report.html README.md"
).split()
REFUSED = itertools.cycle([28, 30, 13, 122])  # no room, read-only, no permission, over quota
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
refused = ""  # part of the place that the disk refuses now
deleted = False  # whether the run folder is deleted at that place, instead


def fault(event: str, arguments: tuple) -> None:
    global refused
    if not refused or event not in ("open", "os.mkdir") or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return
    path = os.fsdecode(arguments[0])
    is_write = event == "os.mkdir" or (isinstance(arguments[2], int) and arguments[2] & WRITES)
    if is_write and str(config.run.folder) in path and refused in path:
        refused = ""
        if deleted:
            shutil.rmtree(config.run.folder)
            return
        code = next(REFUSED)
        raise OSError(code, os.strerror(code), path)


def attempt(place: str) -> None:
    global refused
    refused = place
    try:
        run_sequence(config)
        print(f"{place or 'nothing'}: finished", flush=True)
    except SculptError as error:
        print(f"{place}: {type(error).__name__}: {error}", flush=True)
    left = [str(path) for path in Path(config.run.folder).rglob(".*.tmp")]
    assert not left, left


config = load_config(Path(sys.argv[1]), sys.argv[2:])
sys.addaudithook(fault)
for name in PLACES:
    attempt(name)
attempt("")
deleted = True
config = load_config(Path(sys.argv[1]), [*sys.argv[2:], f"run.folder={config.run.folder}-2"])
attempt("/checkpoints/")
