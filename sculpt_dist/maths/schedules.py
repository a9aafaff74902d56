"""Schedules over a concept's progress, from 0 (first update) to 1 (end). Plain numbers in, plain numbers out."""

from __future__ import annotations

import math


def one_cycle(progress: float, warmup: float, start: float = 1 / 25, end: float = 1 / 250_000) -> float:
    """The one-cycle factor on the peak learning rate: cosine up from `start` during `warmup`, cosine down to `end`.

    The defaults are those of torch's OneCycleLR, which the published code uses (Smith and Topin, arXiv 1708.07120).
    """
    if progress < warmup:
        return start + (1 - start) * (1 - math.cos(math.pi * progress / warmup)) / 2
    fall = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    return end + (1 - end) * (1 + math.cos(math.pi * fall)) / 2


def learning_rate_factor(schedule: str, progress: float, warmup: float) -> float:
    """The factor on the peak learning rate at `progress`, 0 to 1, under the schedule that `train.schedule` names.

    one_cycle: see above. The others rise linearly from 0 during `warmup`; then constant stays at 1, linear falls to 0,
    and cosine falls to 0 by half a cosine, as transformers' schedules of these names do.
    """
    if schedule == "one_cycle":
        return one_cycle(progress, warmup)
    if progress < warmup:
        return progress / warmup
    fall = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    return {"constant": 1.0, "linear": 1 - fall, "cosine": (1 + math.cos(math.pi * fall)) / 2}[schedule]


def turnover_share(turnover: float, progress: float) -> float:
    """The share of open weights to swap: turnover (1 + cos(pi progress)) / 2, as in Sculpting Memory's code."""
    return turnover * (1 + math.cos(math.pi * progress)) / 2


def turnover_count(num_open: int, share: float) -> int:
    """How many of `num_open` weights to swap: at least one when any is open."""
    return min(num_open, max(1, int(share * num_open)))
