"""Runs `unlearn` with one rank that computes ten times as slowly as the others.

Arguments: RANK PATIENCE CONFIG OVERRIDES... A rank for which the others wait PATIENCE seconds in one collective is
reported as late, as on GPUs.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from typing import Any

import torch

from sculpt_dist.backbones.sana import Backbone
from sculpt_dist.cli import main as cli
from sculpt_dist.run import session

slow, patience, *arguments = sys.argv[1:]
denoise = Backbone.denoise


def slowly(*given: Any) -> torch.Tensor:
    began = time.monotonic()
    predicted = denoise(*given)
    passes = 3 if predicted.requires_grad else 1  # a backward costs two forwards
    time.sleep(9 * passes * (time.monotonic() - began))
    return predicted


if os.environ["RANK"] == slow:
    Backbone.denoise = slowly
session.watched = functools.partial(session.watched, late_after=float(patience))
sys.argv = ["sculpt-dist", "unlearn", *arguments]
cli.main()
