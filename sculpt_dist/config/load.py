"""The configuration: dataclass defaults < yaml files < `key=value`, merged one at a time so that a bad key is named."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sculpt_dist.config.checks import check, check_numbers
from sculpt_dist.config.interpolation import environment_texts, with_texts, without_values
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError

Section = TypeVar("Section")


def load_config(file: Path | None, overrides: Sequence[str] | DictConfig = ()) -> RunConfig:
    """Merge the defaults, the yaml file (after the file that its `include` names), and the overrides.

    `overrides`: `key=value` strings or a nested mapping. Raises ConfigError that names the file or override, the key,
    what was found and what there is.
    """
    updates = [(str(source), content) for source, content in _with_included(file, ())] if file is not None else []
    if isinstance(overrides, DictConfig):
        updates.append(("arguments", overrides))
    else:
        updates += [(f"override {override!r}", _parse_override(override)) for override in overrides]
    merged = _merged(_defaults(RunConfig), updates)
    try:
        texts = environment_texts(OmegaConf.to_container(merged))
        config = with_texts(cast(RunConfig, OmegaConf.to_object(merged)), texts)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file or 'configuration'}: {_first_line(error)}") from error
    check(config)
    return config


def merge_section(section: type[Section], values: Mapping[str, Any], where: str, prefix: str = "method.") -> Section:
    """Fill one dataclass from plain values, with the same merge and the same errors as the whole configuration."""
    try:
        merged = _merged(_defaults(cast(type, section)), [(where, OmegaConf.create(dict(values)))], prefix)
        if environment_texts(OmegaConf.to_container(merged)):
            raise ConfigError(f"{where}: takes a value from the environment, which only a run's own configuration may")
        filled = cast(Section, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from error
    check_numbers(filled, prefix)
    return filled


def to_yaml(config: RunConfig) -> str:
    """The complete configuration as yaml, which loads as the same configuration; without values of the environment."""
    return OmegaConf.to_yaml(OmegaConf.structured(without_values(config)))


def plain_values(config: RunConfig) -> dict[str, Any]:
    """What loading `to_yaml` gives, as dicts and lists, without going through the text."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(without_values(config))))
    return values


def _with_included(file: Path, includers: Sequence[Path]) -> Iterator[tuple[Path, DictConfig]]:
    """The files whose sections are merged, in order: `include: other.yaml` (relative to the file) comes first."""
    if file.resolve() in includers:
        raise ConfigError(f"{file}: includes itself, by way of {', '.join(path.name for path in includers)}")
    content = read_yaml(file)
    included = cast(dict[str, Any], OmegaConf.to_container(content)).get("include")
    content.pop("include", None)
    if included is not None:
        yield from _with_included(file.parent / str(included), (*includers, file.resolve()))
    yield file, content


def read_yaml(file: Path) -> DictConfig:
    """A configuration file's sections. Raises ConfigError that names the file."""
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such configuration file")
    try:
        content = OmegaConf.load(file)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: is not readable as yaml: {error}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{file}: contains {type(content).__name__}, expected sections such as 'train:'")
    return content


def _parse_override(override: str) -> DictConfig:
    if not re.match(r"[A-Za-z_][\w.\[\]]*=", override):
        raise ConfigError(f"override {override!r}: write key=value, for example train.lr=1e-5")
    try:
        return OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"override {override!r}: {_first_line(error)}") from error


def _merged(base: DictConfig, updates: Sequence[tuple[str, DictConfig]], prefix: str = "") -> DictConfig:
    """`base` with each (source, content) merged over it. Raises ConfigError that names the first that does not fit."""
    try:
        return _merge_all(base, [update for _, update in updates])  # at once: every merge copies the base
    except (OmegaConfBaseException, ValueError, TypeError):
        for where, update in updates:
            base = _merge(base, update, where, prefix)
        return base


def _merge_all(base: DictConfig, updates: Sequence[DictConfig]) -> DictConfig:
    return cast(DictConfig, OmegaConf.merge(base, *updates))


def _merge(base: DictConfig, update: DictConfig, where: str, prefix: str) -> DictConfig:
    try:
        return _merge_all(base, [update])
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        key = prefix + str(getattr(error, "full_key", "") or "")
        message = _first_line(error)
        keys = list(_dotted(base, prefix))
        close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6) if key not in keys else []
        hint = f" Did you mean {close[0]!r}?" if close and "Did you mean" not in message else ""
        known = ", ".join(sorted(k for k in keys if k.rpartition(".")[0] == key.rpartition(".")[0]))
        listed = f" There are: {known}." if key not in keys and known else ""
        raise ConfigError(f"{where}: {key}: {message}.{hint}{listed}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _dotted(node: DictConfig, prefix: str) -> Iterable[str]:
    for key in node:
        yield prefix + str(key)
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _dotted(child, f"{prefix}{key!s}.")


@cache
def _defaults(section: type) -> DictConfig:
    """A dataclass's defaults, to merge over."""
    return _writable(OmegaConf.structured(section))


def _writable(node: DictConfig) -> DictConfig:
    """Frozen dataclasses arrive read-only; they are merged while still open and frozen when made into objects."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _writable(child)
    return node
