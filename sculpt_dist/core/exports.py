"""Lazy exports (PEP 562): `from sculpt_dist.run import run_sequence` imports `sculpt_dist.run.sequence` only then."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose public names live in its submodules.

    `homes` maps each public name to the submodule that defines it. A package repeats these names in an
    `if TYPE_CHECKING:` block, which is what editors and mypy read.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return get, lambda: sorted(homes)
