"""Lazy exports of packages."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import rank_environment

import sculpt_dist
from sculpt_dist.core.exports import lazy_exports

PACKAGES = sorted(
    module.name
    for module in pkgutil.iter_modules(sculpt_dist.__path__, "sculpt_dist.")
    if module.ispkg and "lazy_exports" in Path(module.module_finder.path, module.name[12:], "__init__.py").read_text()
)


def test_an_exported_name_comes_from_its_submodule():
    from sculpt_dist.core import types

    get, _ = lazy_exports("sculpt_dist.core", {"types": ["Losses"]})
    assert get("Losses") is types.Losses


def test_an_unknown_name_raises_an_attribute_error_with_the_package():
    get, _ = lazy_exports("sculpt_dist.core", {"types": ["Losses"]})
    with pytest.raises(AttributeError, match=r"module 'sculpt_dist\.core' has no attribute 'Loses'"):
        get("Loses")


def test_dir_lists_the_exported_names():
    _, names = lazy_exports("sculpt_dist.core", {"types": ["Stream", "Losses"], "errors": ["ConfigError"]})
    assert names() == ["ConfigError", "Losses", "Stream"]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_exports_what_type_checkers_see(package):
    module = importlib.import_module(package)
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    checked = {
        alias.asname or alias.name
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert checked == set(dir(module))
    assert all(getattr(module, name) is not None for name in checked)
    assert not checked & {submodule.name for submodule in pkgutil.iter_modules(module.__path__)}


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_imports_no_torch(package):
    code = f"import sys, {package}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=rank_environment())
