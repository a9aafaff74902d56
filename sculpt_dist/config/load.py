"""The configuration: dataclass defaults < yaml files < `key=value`, merged one at a time so that a bad key is named."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sculpt_dist.config.checks import check, check_numbers
from sculpt_dist.config.interpolation import environment_texts, with_places, without_values
from sculpt_dist.config.packaged import find_config
from sculpt_dist.config.scalars import is_collection, is_mapping, read_scalar, read_text, type_at
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.config.values import check_passwords, check_paths, check_types
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.messages import shown

Section = TypeVar("Section")
MERGE_ERRORS = (OmegaConfBaseException, ValueError, TypeError, IndexError, OverflowError)


def load_config(file: Path | None, overrides: Sequence[str] | DictConfig = ()) -> RunConfig:
    """Merge the defaults, the yaml file (after the file that its `include` names), and the overrides.

    `file` may be the name of a packaged configuration. `overrides`: `key=value` strings or a nested mapping. Raises
    ConfigError that names the file or override, the key, what was found and what there is.
    """
    updates: list[tuple[str, Update]] = []
    if file is not None:
        updates += [(str(source), content) for source, content in _with_included(find_config(file), ())]
    if isinstance(overrides, DictConfig):
        updates.append(("arguments", overrides))
    else:
        updates += [(f"override {shown(override)!r}", parse_override(override)) for override in overrides]
    merged = _merged(_defaults(RunConfig), updates)
    try:
        content = OmegaConf.to_container(merged)
        check_passwords(content)
        written = environment_texts(content)
        config = with_places(cast(RunConfig, OmegaConf.to_object(merged)), written)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file or 'configuration'}: {_first_line(error)}") from error
    if config.evaluate.classifier is None:
        config = replace(config, evaluate=replace(config.evaluate, classifier=config.model.world))
    check_types(config, "")
    check_paths(config)
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
    check_types(filled, prefix)
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
    try:
        place = file.resolve()
        file.is_file()  # a name may be too long to ask
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{str(file)[:200]!r}: is no file that can be read ({str(error)[:200]})") from error
    if place in includers:
        raise ConfigError(f"{file}: includes itself, by way of {', '.join(path.name for path in includers)}")
    content = read_yaml(file, RunConfig)
    included = cast(dict[str, Any], OmegaConf.to_container(content)).get("include")
    content.pop("include", None)
    if included is not None:
        yield from _with_included(file.parent / str(included), (*includers, place))
    yield file, content


def read_yaml(file: Path, kind: type) -> DictConfig:
    """A configuration file's sections, which are those of the dataclass `kind`. Raises ConfigError that names it."""
    if not file.is_file():
        hint = "" if file.suffix else "; `sculpt-dist configs` lists those that come with the program"
        raise ConfigError(f"{file}: there is no such configuration file{hint}")
    try:
        content = OmegaConf.create(read_text(file.read_text(encoding="utf-8"), kind) or {})
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: is not readable as yaml: {' '.join(str(error).split())}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{file}: contains {type(content).__name__}, expected sections such as 'train:'")
    return content


def read_run_config(file: Path) -> Any:
    """The values of a run's config.yaml, as `plain_values`; whatever a damaged one holds.

    Raises OSError, UnicodeDecodeError and YAMLError for one that cannot be read.
    """
    try:
        return read_text(file.read_text(encoding="utf-8"), RunConfig)
    except RecursionError as error:
        raise YAMLError(str(error)) from error


@dataclass(frozen=True)
class Indexed:
    """An override of one member of a list, such as concepts[0].target=dog."""

    keys: tuple[str | int, ...]
    value: Any


Update = DictConfig | Indexed
KEY_PART = re.compile(r"""\.?(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|\[(?P<index>\d+)\]|(?P<plain>[^.=\[\]"']+))""")


def parse_override(override: str) -> Update:
    """`key=value` by the type of the key. Raises ConfigError that shows the working form."""
    where = f"override {shown(override)!r}"
    keys, text = _split_override(override, where)
    kind = type_at(RunConfig, keys)
    try:
        override.encode()
        if text.strip() == "???":
            raise ValueError("??? cannot be a value")
        value = read_scalar(text, kind)
    except (YAMLError, RecursionError, ValueError) as error:
        remedy = f"; quote what holds special characters: {_form(keys, kind)}" if is_collection(kind) else ""
        raise ConfigError(f"{where}: {_first_line(error)}{remedy}") from error
    is_reference = isinstance(value, str) and value.startswith("${")
    if is_collection(kind) and not is_reference and not isinstance(value, (list, dict, type(None))):
        raise ConfigError(f"{where}: write {_form(keys, kind)}")
    if any(isinstance(key, int) for key in keys):
        return Indexed(keys, value)
    for key in reversed(keys):
        value = {key: value}
    try:
        return cast(DictConfig, OmegaConf.create(value))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from error


def _split_override(override: str, where: str) -> tuple[tuple[str | int, ...], str]:
    """The parts of the key, and the text of the value. A name from the user, such as a concept's, may have spaces."""
    keys: list[str | int] = []
    place = 0
    while place < len(override) and override[place] != "=":
        part = KEY_PART.match(override, place)
        if part is None or (place == 0) == part[0].startswith((".", "[")):
            break
        name = next(name for name in (part["double"], part["single"], part["index"], part["plain"]) if name is not None)
        is_name = part["plain"] is None or is_mapping(type_at(RunConfig, keys))
        if not is_name and not re.fullmatch(r"[A-Za-z_]\w*", name):
            break
        keys.append(int(name) if part["index"] is not None else name)
        place = part.end()
    if not keys or override[place : place + 1] != "=":
        raise ConfigError(f"{where}: write key=value, for example train.lr=1e-5")
    return tuple(keys), override[place + 1 :]


def _form(keys: Sequence[str | int], kind: Any) -> str:
    """An example of an override of a list or a mapping."""
    key = ".".join(map(str, keys))
    if key == "concepts":
        return f"'{key}=[{{target: cat, superclass: animal}}]'"
    return f"'{key}={{name: value}}'" if is_mapping(kind) else f"""'{key}=["first", "second"]'"""


def _merged(base: DictConfig, updates: Sequence[tuple[str, Update]], prefix: str = "") -> DictConfig:
    """`base` with each (source, content) merged over it. Raises ConfigError that names the first that does not fit."""
    try:
        return _merge_all(base, [update for _, update in updates])  # at once: every merge copies the base
    except MERGE_ERRORS:
        for where, update in updates:
            base = _merge(base, update, where, prefix)
        return base


def _merge_all(base: DictConfig, updates: Sequence[Update]) -> DictConfig:
    for is_plain, group in groupby(updates, lambda update: isinstance(update, DictConfig)):
        if is_plain:
            base = cast(DictConfig, OmegaConf.merge(base, *group))
        else:
            base = copy.deepcopy(base)
            for update in cast(Iterator[Indexed], group):
                _set_member(base, update)
    return base


def _set_member(base: DictConfig, update: Indexed) -> None:
    """Set a member of a list in place. Raises IndexError where the list is shorter."""
    key, at = "", base
    for part in update.keys:
        if isinstance(part, int):
            length = len(at) if OmegaConf.is_list(at) else 0
            if part >= length:
                raise IndexError(f"{key} has {length} members, numbered from 0")
        key += f"[{part}]" if isinstance(part, int) else f"{'.' if key else ''}{part}"
        at = OmegaConf.select(base, key)
        if OmegaConf.is_config(at):
            OmegaConf.set_readonly(at, False)  # as members of frozen dataclasses are
    value, kind = update.value, OmegaConf.get_type(at) if OmegaConf.is_dict(at) else None
    if isinstance(value, dict) and is_dataclass(kind):
        value = OmegaConf.merge(_defaults(cast(type, kind)), value)  # what is not given takes its default
    OmegaConf.update(base, key, value, merge=False)


def _merge(base: DictConfig, update: Update, where: str, prefix: str) -> DictConfig:
    try:
        return _merge_all(base, [update])
    except MERGE_ERRORS as error:
        key = prefix + str(getattr(error, "full_key", "") or "")
        message = _first_line(error)
        keys = list(_dotted(base, prefix))
        close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6) if key not in keys else []
        hint = f" Did you mean {close[0]!r}?" if close and "Did you mean" not in message else ""
        known = ", ".join(sorted(k for k in keys if k.rpartition(".")[0] == key.rpartition(".")[0]))
        listed = f" There are: {known}." if key not in keys and known else ""
        raise ConfigError(f"{where}: {key}: {message}.{hint}{listed}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return shown(lines[0].rstrip(".")) if lines else type(error).__name__


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
