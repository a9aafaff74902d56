"""Plugins: every module of a package except `base` is one, and configurations refer to it by its file name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

from sculpt_dist.core.errors import ConfigError


def plugins(package: str) -> list[str]:
    """Names of the plugins in a package: its modules except `base`. Subpackages hold shared code and do not count."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(module.name for module in found if module.name != "base" and not module.ispkg)


def plugin(package: str, name: str, key: str) -> ModuleType:
    """Import `<package>.<name>`. Raises ConfigError as `check_plugin` does."""
    check_plugin(package, name, key)
    return importlib.import_module(f"{package}.{name}")


def check_plugin(package: str, name: str, key: str) -> None:
    """Raise ConfigError, with the closest name and all names, if a package has no plugin `name`. Imports no plugin."""
    names = plugins(package)
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        kind = package.rpartition(".")[2].removesuffix("s")
        raise ConfigError(f"{key}={name}: there is no such {kind}.{hint} There are: {', '.join(names)}.")
