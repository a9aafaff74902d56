"""Runs `unlearn` where rank 1's disk takes 0.2 s for a file of a checkpoint; each rank prints what it has saved."""

from __future__ import annotations

import os
import sys
import time

from sculpt_dist.cli import main as cli
from sculpt_dist.engine.checkpoints import save

write = save._write_part


def write_slowly(file, tensors):
    if os.environ["RANK"] == "1":
        time.sleep(0.2)
    print(f"rank {os.environ['RANK']} saves {file.parent.name}", flush=True)
    return write(file, tensors)


save._write_part = write_slowly
sys.argv = ["sculpt-dist", "unlearn", *sys.argv[1:]]
cli.main()
