"""Interpolation in a configuration, and how values of environment variables stay out of all files that a run writes.

The keys PLACES, which hold paths, may use `${oc.env:NAME}`. The run uses the variable's value; config.yaml, the report,
the model card, fingerprints and trackers show the text `${oc.env:NAME}`. All other keys refuse it, because their values
are written into prompts, names and numbers everywhere. `${section.key}` refers to another key; if that key uses a
variable, the reference is restricted in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError

PLACES = (
    "model.path model.config prepare.images evaluate.classifier evaluate.reference evaluate.clip run.folder".split()
)
VARIABLE = re.compile(r"\$\{(oc\.env:\s*[A-Za-z_]\w*\s*(?:,[^${}]*)?\})")
KEY = re.compile(r"\$\{\.*[A-Za-z_][\w.\[\]]*\}")
MARK = "\x00"  # stands for the `${` of a variable while keys are resolved


class Place(str):
    """A path from an environment variable or with `~` expanded; `written` is its text in the configuration."""

    written: str


def environment_texts(content: Any) -> dict[str, str]:
    """Key -> text of every value that uses an environment variable, in an unresolved configuration.

    Looks up no variable. Raises ConfigError for a variable outside PLACES, for any other resolver, and for `\\${`,
    which would be resolved when the written configuration is read again.
    """
    for key, text in _texts(content, ""):
        if "\\${" in text or "${" in KEY.sub("", VARIABLE.sub("", text)):
            raise ConfigError(
                f"{key}: {text!r} contains "
                f"'${{', but only ${{oc.env:NAME}}, ${{oc.env:NAME,default}} and ${{section.key}} "
                "are resolved; remove it"
            )
    resolved = OmegaConf.to_container(OmegaConf.create(_marked(content)), resolve=True)
    found = {key: text.replace(MARK, "${") for key, text in _texts(resolved, "") if MARK in text}
    for key, text in found.items():
        if key not in PLACES:
            raise ConfigError(
                f"{key}: {text!r} reads an environment variable, whose value would be written into files and trackers; "
                f"only {', '.join(PLACES)} may do that. Write the value itself, or pass it on the command line"
            )
    return found


def with_places(config: RunConfig, texts: Mapping[str, str]) -> RunConfig:
    """Expand `~` in all PLACES, and make those that differ from their text remember it.

    `texts`: the text of the keys that use an environment variable. Raises ConfigError for an unknown user.
    """
    for key in PLACES:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value is None or not (key in texts or value.startswith("~")):
            continue
        try:
            place = Place(Path(value).expanduser() if value.startswith("~") else value)
        except RuntimeError as error:
            raise ConfigError(f"{key}={value}: there is no such user; write the whole path") from error
        place.written = texts.get(key, value)
        config = replace(config, **{section: replace(getattr(config, section), **{name: place})})
    return config


def without_values(config: RunConfig) -> RunConfig:
    """The configuration as it may be written: every place with its text in the configuration."""
    for key in PLACES:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if isinstance(value, Place):
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
