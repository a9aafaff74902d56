"""Lazy exports (PEP 562): `from sculpt_dist.run import run_sequence` is what imports `sculpt_dist.run.sequence`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_exports(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package whose public names live in its submodules.

    `names` maps each submodule to the names it exports. The package imports the same names under `if TYPE_CHECKING:`,
    which is what editors and mypy read.
    """
    homes = {name: module for module, members in names.items() for name in members}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return get, lambda: sorted(homes)
