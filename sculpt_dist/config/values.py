"""Checks of single values: whether each has the type of its key, and whether a path can be one."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, cast

from sculpt_dist.config.scalars import hints
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.messages import PASSWORD, redacted, shown

PLACES = (
    "model.path model.config prepare.images prepare.folder evaluate.classifier evaluate.witness evaluate.reference "
    "evaluate.clip run.folder"
).split()
NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
LONGEST_PART, LONGEST_PATH = 255, 4095  # bytes, on every usual file system


def check_types(section: Any, prefix: str) -> None:
    """Raises ConfigError for a value of another type than its key; OmegaConf does not look into lists and mappings."""
    for f in fields(section):
        value, kind, key = getattr(section, f.name), hints(cast(Any, type(section)))[f.name], prefix + f.name
        for part, member in [(key, value), *((f"{key}[{i}]", one) for i, one in enumerate(_listed(value)))]:
            if is_dataclass(member):
                check_types(member, f"{part}.")
        if not _fits(value, kind):
            raise ConfigError(f"{key}={shown(value)}: must be {_named(kind)}")


def check_paths(config: RunConfig) -> None:
    """Raises ConfigError for a path that no file system can have."""
    for key, path in paths(config):
        fault = _path_fault(path)
        if fault is not None:
            raise ConfigError(f"{key}={shown(path)}: {fault}")


def check_passwords(content: Any) -> None:
    """Raises ConfigError for an address with a password in plain containers: a run writes its configuration."""
    for key, text in texts(content, ""):
        if PASSWORD.search(text):
            raise ConfigError(
                f"{key}={shown(redacted(text))}: holds a password or token, which the run would write into its files; "
                "give a folder, or a hub id and HF_TOKEN in the environment"
            )


def paths(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Every path that a configuration names: (key, path)."""
    for key in (*PLACES, "hold.prompts", "evaluate.retain_prompts"):
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value is not None:
            yield key, value
    yield from ((f"prepare.prompts.files.{name}", path) for name, path in config.prepare.prompts.files.items())
    yield from ((f"evaluate.prompts.{name}", path) for name, path in (config.evaluate.prompts or {}).items())


def texts(content: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text in nested dicts and lists, with its key."""
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, dict):
        for name, member in content.items():
            yield from texts(member, f"{key}.{name}" if key else str(name))
    elif isinstance(content, (list, tuple)):
        for i, member in enumerate(content):
            yield from texts(member, f"{key}[{i}]")


def _path_fault(path: str) -> str | None:
    if "\0" in path:
        return "a path contains no zero byte"
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        return "holds a character that no path can have"
    longest = max(map(len, encoded.split(b"/")))
    if longest > LONGEST_PART:
        return f"a part of it has {longest} bytes, and a file system takes {LONGEST_PART}"
    return f"has {len(encoded)} bytes, and a path {LONGEST_PATH} at most" if len(encoded) > LONGEST_PATH else None


def _listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else ()


def _fits(value: Any, kind: Any) -> bool:
    origin, given = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in given)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, given[0]) and _fits(v, given[1]) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(_fits(member, given[0]) for member in value)
    if origin is tuple:
        members = list(_listed(value))
        wanted = [given[0]] * len(members) if given[-1] is ... else list(given)
        return len(members) == len(wanted) and all(map(_fits, members, wanted))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


def _named(kind: Any) -> str:
    """A type in words."""
    origin, given = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_named, given)))
    if origin is dict:
        return f"{{name: {_named(given[1])}}}"
    if origin in (list, tuple):
        return f"[{', '.join('...' if one is ... else _named(one) for one in given)}]"
    return NAMES.get(kind, "null" if kind is types.NoneType else getattr(kind, "__name__", "a value"))
