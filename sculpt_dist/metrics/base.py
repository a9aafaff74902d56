"""Deprecated alias of `sculpt_dist.evaluation.classifiers.base`; to be removed in the release after 0.1."""

from __future__ import annotations

import warnings
from typing import Any

MOVED = ("Classifier", "Verdict")
NEW_HOME = "sculpt_dist.evaluation.classifiers.base"


def __getattr__(name: str) -> Any:
    if name not in MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} moved: import {name} from {NEW_HOME}", DeprecationWarning, stacklevel=2)
    from sculpt_dist.evaluation.classifiers import base

    return getattr(base, name)


def __dir__() -> list[str]:
    return sorted(MOVED)
