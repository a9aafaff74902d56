"""The reference of keys: every key has a sentence, and what it says is what the dataclasses hold."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest
from harness import rank_environment

from sculpt_dist.config import schema
from sculpt_dist.config.load import plain_values
from sculpt_dist.config.reference import reference, reference_markdown, run_keys, summaries
from sculpt_dist.core.plugins import METHODS, plugin, plugins


def test_every_key_has_a_sentence():
    assert not [key.name for key in reference() if not key.meaning.endswith(".")]


def test_the_run_keys_are_those_of_the_dataclasses():
    def names(section: type, prefix: str) -> set[str]:
        found = set()
        for field in fields(section):
            inner = getattr(schema, str(field.type), None)
            found |= names(inner, f"{prefix}{field.name}.") if is_dataclass(inner) else {prefix + field.name}
        return found

    listed = {key.name for key in run_keys() if "[]" not in key.name}
    assert listed == names(schema.RunConfig, "")


@pytest.mark.parametrize("name", plugins(METHODS))
def test_the_options_of_a_method_are_all_listed(name):
    config = plugin(METHODS, name, "method.name").Config
    listed = {key.name for key in reference(f"method.{name}.")}
    assert listed == {f"method.{name}.{field.name}" for field in fields(config) if field.name != "name"}


def test_defaults_are_written_as_yaml_writes_them():
    defaults = {key.name: key.default for key in reference()}
    values = plain_values(schema.RunConfig())
    assert defaults["train.lr"] == "3e-06" and values["train"]["lr"] == 3e-6
    assert (defaults["model.path"], defaults["model.cut_prompts"], defaults["model.arch"]) == ("null", "false", "sd15")
    assert defaults["concepts"] == "[]" and defaults["concepts[].target"] == ""


def test_markdown_has_a_row_for_every_key():
    text = reference_markdown()
    assert all(f"| `{key.name}` |" in text for key in reference())


def test_the_reference_does_not_import_torch():
    code = (
        "import sys; from sculpt_dist.config.reference import reference; reference(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=rank_environment())


@pytest.mark.parametrize("package", ["methods", "backbones", "evaluation.metrics", "evaluation.classifiers"])
def test_every_plugin_says_what_it_is_in_a_line(package):
    found = summaries(f"sculpt_dist.{package}")
    assert found and all(len(line) > 20 for line in found.values())
