"""Plugins: every module of a package except `base` is one, and configurations refer to it by its file name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

from sculpt_dist.core.errors import ConfigError

Packages = str | tuple[str, ...]  # one package, or several whose plugins stand under one key
METHODS = ("sculpt_dist.methods", "sculpt_dist.guards")  # of method.name


def plugins(packages: Packages) -> list[str]:
    """Names of the plugins in a package: its modules except `base`. Subpackages hold shared code and do not count."""
    found = pkgutil.iter_modules([place for package in _all(packages) for place in _places(package)])
    return sorted(module.name for module in found if module.name != "base" and not module.ispkg)


def plugin(packages: Packages, name: str, key: str) -> ModuleType:
    """Import `<package>.<name>`. Raises ConfigError as `check_plugin` does."""
    return importlib.import_module(f"{check_plugin(packages, name, key)}.{name}")


def check_plugin(packages: Packages, name: str, key: str) -> str:
    """The package that has the plugin `name`; imports no plugin.

    Raises ConfigError, with the closest name and all names, where none has it.
    """
    for package in _all(packages):
        if name in plugins(package):
            return package
    names = plugins(packages)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    kind = _all(packages)[0].rpartition(".")[2].removesuffix("s")
    raise ConfigError(f"{key}={name}: there is no such {kind}.{hint} There are: {', '.join(names)}.")


def _all(packages: Packages) -> tuple[str, ...]:
    return (packages,) if isinstance(packages, str) else packages


def _places(package: str) -> list[str]:
    return list(importlib.import_module(package).__path__)
