"""Interpolation in a configuration, and how values of environment variables stay out of all files that a run writes.

The keys PLACES, which hold paths, may use `${oc.env:NAME}`. The run uses the variable's value; config.yaml, the report,
the model card, fingerprints and trackers show the text `${oc.env:NAME}`. All other keys refuse it, because their values
are written into prompts, names and numbers everywhere. `${section.key}` refers to another key; if that key uses a
variable, the reference is restricted in the same way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sculpt_dist.config.schema import RunConfig
from sculpt_dist.config.values import PLACES, texts
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.messages import hide, shown

VARIABLE = re.compile(r"\$\{(oc\.env:\s*[A-Za-z_]\w*\s*(?:,[^${}]*)?\})")
KEY = re.compile(r"\$\{\.*[A-Za-z_][\w.\[\]]*\}")
SHORTEST_HIDDEN = 4  # characters: / and the like stay
MARK = "\x00"  # stands for the `${` of a variable while keys are resolved


class Place(str):
    """A path from an environment variable or with `~` expanded; `written` is its text in the configuration."""

    written: str


def environment_texts(content: Any) -> dict[str, str]:
    """Key -> text of every value that uses an environment variable, in an unresolved configuration.

    Looks up no variable. Raises ConfigError for a variable outside PLACES, for any other resolver, and for `\\${`,
    which would be resolved when the written configuration is read again.
    """
    if not any("${" in text for _, text in texts(content, "")):
        return {}
    for key, text in texts(content, ""):
        if "\\${" in text or "${" in KEY.sub("", VARIABLE.sub("", text)):
            raise ConfigError(
                f"{key}: {shown(text)!r} contains "
                f"'${{', but only ${{oc.env:NAME}}, ${{oc.env:NAME,default}} and ${{section.key}} "
                "are resolved; remove it"
            )
    resolved = OmegaConf.to_container(OmegaConf.create(_marked(content)), resolve=True)
    found = {key: text.replace(MARK, "${") for key, text in texts(resolved, "") if MARK in text}
    for key, text in found.items():
        if key not in PLACES:
            raise ConfigError(
                f"{key}: {shown(text)!r} reads an environment variable, whose value would be written into files and "
                f"trackers; only {', '.join(PLACES)} may do that. Write the value itself, or pass it as an override"
            )
    return found


def with_places(config: RunConfig, written: Mapping[str, str]) -> RunConfig:
    """Expand `~` in all PLACES, and make those that differ from their text remember it.

    `written`: the text of the keys that use an environment variable, which messages then show.
    Raises ConfigError for an unknown user.
    """
    for key in PLACES:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value is None or not (key in written or value.startswith("~")):
            continue
        try:
            place = Place(Path(value).expanduser() if value.startswith("~") else value)
        except RuntimeError as error:
            raise ConfigError(f"{key}={shown(value)}: there is no such user; write the whole path") from error
        place.written = written.get(key, value)
        if key in written:
            _hide(value, written[key])
        config = replace(config, **{section: replace(getattr(config, section), **{name: place})})
    return config


def _hide(value: str, written: str) -> None:
    """Keep the values of the variables in a text out of messages, and the whole value, too."""
    hide(value, written)
    for name in re.findall(r"oc\.env:\s*(\w+)", written):
        if len(os.environ.get(name, "")) >= SHORTEST_HIDDEN:
            hide(os.environ[name], f"${{oc.env:{name}}}")


def without_values(config: RunConfig) -> RunConfig:
    """The configuration as it may be written: every place with its text in the configuration."""
    for key in PLACES:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if isinstance(value, Place):
            config = replace(config, **{section: replace(getattr(config, section), **{name: value.written})})
    return config


def _marked(content: Any) -> Any:
    if isinstance(content, str):
        return VARIABLE.sub(MARK + r"\1", content)
    if isinstance(content, dict):
        return {name: _marked(member) for name, member in content.items()}
    return [_marked(member) for member in content] if isinstance(content, (list, tuple)) else content
