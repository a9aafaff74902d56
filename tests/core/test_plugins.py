"""Plugins: found by file name, and reported by name when there is no such file."""

from __future__ import annotations

import sys

import pytest

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.plugins import check_plugin, plugin, plugins


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """A package with two plugins, their base and a subpackage."""
    for file in ("__init__", "base", "circle", "square", "shared/__init__"):
        path = tmp_path / "shapes" / f"{file}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"sides = {0 if file == 'circle' else 4}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "shapes"
    for name in [name for name in sys.modules if name.partition(".")[0] == "shapes"]:
        del sys.modules[name]


def test_plugins_are_the_modules_except_base_and_subpackages(shapes):
    assert plugins(shapes) == ["circle", "square"]


def test_a_plugin_is_imported_by_its_file_name(shapes):
    assert plugin(shapes, "circle", "draw.shape").sides == 0


def test_an_unknown_plugin_is_refused_with_a_close_name_and_all_names(shapes):
    with pytest.raises(ConfigError) as caught:
        plugin(shapes, "squere", "draw.shape")
    message = str(caught.value)
    assert message.startswith("draw.shape=squere: there is no such shape.")
    assert "Did you mean 'square'?" in message and message.endswith("There are: circle, square.")


def test_the_check_of_a_name_imports_no_plugin(shapes):
    check_plugin(shapes, "circle", "draw.shape")
    assert "shapes.circle" not in sys.modules
    with pytest.raises(ConfigError, match=r"such shape\. There are"):
        check_plugin(shapes, "xyz", "draw.shape")
