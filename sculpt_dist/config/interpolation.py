"""Interpolation in a configuration: what is resolved, and how values of the environment stay out of all that is written.

`${oc.env:NAME}` may stand in the keys PLACES, which say where something lies. The run uses its value; config.yaml, the report, the
model card, fingerprints and trackers get the text `${oc.env:NAME}`. Anywhere else it is refused, as the value would end up in prompts,
names and numbers that are written everywhere. `${section.key}` refers to another key, and carries what that one may not do along.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from omegaconf import OmegaConf

from sculpt_dist.core.errors import ConfigError

Config = TypeVar("Config")
PLACES = (
    "model.path model.config prepare.images evaluate.classifier evaluate.reference evaluate.clip run.folder".split()
)
VARIABLE = re.compile(r"\$\{(oc\.env:\s*[A-Za-z_]\w*\s*(?:,[^${}]*)?\})")
KEY = re.compile(r"\$\{\.*[A-Za-z_][\w.\[\]]*\}")
MARK = "\x00"  # stands for the `${` of a variable while keys are resolved


class FromEnvironment(str):
    """A value that the environment gave; `written` is what the configuration says in its place."""

    written: str


def environment_texts(content: Any) -> dict[str, str]:
    """Key -> text of the values that hang on the environment, from an unresolved configuration; no value of it is looked up.

    Raises ConfigError for a variable outside PLACES, for any other resolver, and for `\\${`, which a second reading would resolve.
    """
    for key, text in _texts(content, ""):
        if "\\${" in text or "${" in KEY.sub("", VARIABLE.sub("", text)):
            raise ConfigError(
                f"{key}: {text!r} holds '${{': only ${{oc.env:NAME}}, ${{oc.env:NAME,default}} and ${{section.key}} are resolved"
            )
    resolved = OmegaConf.to_container(OmegaConf.create(_marked(content)), resolve=True)
    found = {key: text.replace(MARK, "${") for key, text in _texts(resolved, "") if MARK in text}
    for key, text in found.items():
        if key not in PLACES:
            raise ConfigError(
                f"{key}: {text!r} is taken from the environment, and would be written into files and trackers: only {', '.join(PLACES)} "
                "may be; write the value itself, or give it on the command line"
            )
    return found


def with_texts(config: Config, texts: Mapping[str, str]) -> Config:
    """The configuration whose values at these keys remember the text that they came from."""
    for key, text in texts.items():
        section, name = key.split(".")
        value = FromEnvironment(getattr(getattr(config, section), name))
        value.written = text
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def without_values(config: Config) -> Config:
    """The configuration as it may be written: with texts in place of values that the environment gave."""
    for key in PLACES:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if isinstance(value, FromEnvironment):
            config = replace(config, **{section: replace(getattr(config, section), **{name: value.written})})
    return config


def _texts(content: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, dict):
        for name, member in content.items():
            yield from _texts(member, f"{key}.{name}" if key else str(name))
    elif isinstance(content, (list, tuple)):
        for i, member in enumerate(content):
            yield from _texts(member, f"{key}[{i}]")


def _marked(content: Any) -> Any:
    if isinstance(content, str):
        return VARIABLE.sub(MARK + r"\1", content)
    if isinstance(content, dict):
        return {name: _marked(member) for name, member in content.items()}
    return [_marked(member) for member in content] if isinstance(content, (list, tuple)) else content
