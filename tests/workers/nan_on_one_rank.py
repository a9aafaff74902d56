"""Runs `unlearn` with a NaN in rank 1's forget loss at the fourth update."""

from __future__ import annotations

import os
import sys

from sculpt_dist.cli import main as cli
from sculpt_dist.core.types import Losses
from sculpt_dist.methods import dm_cal

losses, calls = dm_cal.Method.losses, []


def faulty(self: dm_cal.Method, step: object) -> Losses:
    result = losses(self, step)
    calls.append(1)
    if len(calls) == 4 and os.environ["RANK"] == "1":
        return Losses(dict(result.terms) | {"forget": result.terms["forget"] * float("nan")})
    return result


dm_cal.Method.losses = faulty
sys.argv = ["sculpt-dist", "unlearn", *sys.argv[1:]]
cli.main()
