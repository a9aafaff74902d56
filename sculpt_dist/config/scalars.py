"""Reads yaml by the types of the configuration: what is text there keeps its characters.

Plain yaml takes `007`, `1e3`, `24:00` and `no` for numbers, times and truth values, whatever the key. Here the key's
type decides. Where it is not text, or not known, a plain scalar is a number, a truth value or null by YAML 1.2's core
schema; there a number with leading zeros stays text, too. Quotes always make text.
"""

from __future__ import annotations

import itertools
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any, cast

import yaml

NULLS = ("", "~", "null", "Null", "NULL")
TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
TEXT = "tag:yaml.org,2002:str"
MERGE = "<<"
MAX_DEPTH = 50
MAX_VALUES = 100_000  # a few lines with anchors can stand for billions


class _Loader(yaml.composer.Composer, yaml.parser.Parser, yaml.scanner.Scanner, yaml.reader.Reader):
    """Composes nodes without guessing what a plain scalar is."""

    def __init__(self, text: str) -> None:
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        self._resolver = yaml.resolver.BaseResolver()

    def descend_resolver(self, *_: Any) -> None:
        """Nothing: there is nothing to resolve."""

    def ascend_resolver(self) -> None:
        """Nothing."""

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        return str(self._resolver.resolve(kind, value, implicit))


def read_text(text: str, kind: Any) -> Any:
    """The value of a yaml document whose type should be `kind`, such as a dataclass or `list[str]`; Any if not known.

    Returns dicts, lists and scalars. A value of another type than `kind` is returned as it is, for the caller to
    refuse. Raises yaml.YAMLError.
    """
    node = _Loader(text).get_single_node()
    return None if node is None else _value(node, kind, 0, itertools.count(1))


def read_scalar(text: str, kind: Any) -> Any:
    """The value that `key=TEXT` on the command line gives a key of type `kind`. Raises yaml.YAMLError."""
    if _bare(kind) is not str:
        return read_text(text, kind)
    if text.strip() in NULLS:
        return None
    if text.lstrip()[:1] in ("'", '"'):
        try:
            node = _Loader(text).get_single_node()
        except yaml.YAMLError:
            return text
        return _whole(node.value, node) if isinstance(node, yaml.ScalarNode) else text
    return text


def type_at(kind: Any, keys: typing.Sequence[str | int]) -> Any:
    """The type of a nested key, such as `prompts`, `object` in a dataclass; Any if not known."""
    for key in keys:
        kind = _bare(kind)
        if is_dataclass(kind) and isinstance(key, str):
            kind = hints(cast(Any, kind)).get(key, Any)
        elif isinstance(key, str):
            kind = _member(kind, dict)
        else:
            kind = _member(kind, list)
    return kind


def is_mapping(kind: Any) -> bool:
    """Whether a type is a dict of the user's own names."""
    return typing.get_origin(_bare(kind)) is dict


def is_collection(kind: Any) -> bool:
    """Whether a type is a list or a dict."""
    return typing.get_origin(_bare(kind)) in (list, tuple, dict)


@cache
def hints(section: Any) -> Mapping[str, Any]:
    """The types of a dataclass's fields."""
    return typing.get_type_hints(section)


def _value(node: Any, kind: Any, depth: int, counter: Iterator[int]) -> Any:
    """The value of a node; `counter` counts those of the whole document."""
    if depth > MAX_DEPTH:
        raise yaml.MarkedYAMLError(problem=f"is nested more than {MAX_DEPTH} deep", problem_mark=node.start_mark)
    if next(counter) > MAX_VALUES:
        raise yaml.MarkedYAMLError(problem=f"stands for over {MAX_VALUES:,} values", problem_mark=node.start_mark)
    kind = _bare(kind)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, kind, depth, counter)
    if isinstance(node, yaml.SequenceNode):
        _refuse_tag(node, "tag:yaml.org,2002:seq")
        return [_value(member, type_at(kind, [i]), depth + 1, counter) for i, member in enumerate(node.value)]
    _refuse_tag(node, TEXT)
    node.value = _whole(node.value, node)
    if node.style is not None:  # quoted, or a block
        return node.value
    if node.value in NULLS:
        return None
    return node.value if kind is str else _core(node.value)


def _whole(text: str, node: Any) -> str:
    """The text with joined pairs of surrogates, as json writes characters; `???` means "missing" to OmegaConf."""
    try:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise yaml.MarkedYAMLError(problem="holds half of a character", problem_mark=node.start_mark) from error
    if text == "???":
        raise yaml.MarkedYAMLError(problem="??? cannot be a value", problem_mark=node.start_mark)
    return text


def _mapping(node: yaml.MappingNode, kind: Any, depth: int, counter: Iterator[int]) -> dict[Any, Any]:
    _refuse_tag(node, "tag:yaml.org,2002:map")
    found: dict[Any, Any] = {}
    merged: dict[Any, Any] = {}
    for name, member in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be a name", problem_mark=name.start_mark)
        if name.value == MERGE and name.style is None:
            for other in member.value if isinstance(member, yaml.SequenceNode) else [member]:
                if not isinstance(other, yaml.MappingNode):
                    raise yaml.MarkedYAMLError(problem="<< takes a mapping", problem_mark=member.start_mark)
                merged = _mapping(other, kind, depth + 1, counter) | merged
            continue
        if name.value in found:
            raise yaml.MarkedYAMLError(problem=f"found duplicate key {name.value}", problem_mark=name.start_mark)
        found[name.value] = _value(member, type_at(kind, [name.value]), depth + 1, counter)
    return merged | found


def _refuse_tag(node: yaml.Node, plain: str) -> None:
    if node.tag != plain:
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag!r} is not read", problem_mark=node.start_mark)


def _core(text: str) -> Any:
    """A plain scalar by YAML 1.2's core schema."""
    if text in TRUTHS:
        return TRUTHS[text]
    if INTEGER.fullmatch(text):
        return int(text) if len(text) < 400 else text
    if OTHER_BASE.fullmatch(text) and len(text) < 400:
        return int(text, 0)
    if FLOAT.fullmatch(text):
        return float(text)
    special = SPECIAL.fullmatch(text)
    return text if special is None else float(text.replace(".", "", 1))


def _bare(kind: Any) -> Any:
    """The type without `| None`."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        others = [one for one in typing.get_args(kind) if one is not types.NoneType]
        return others[0] if len(others) == 1 else Any
    return kind


def _member(kind: Any, of: type) -> Any:
    """The type of a member of a list, tuple or dict."""
    origin, given = typing.get_origin(kind), typing.get_args(kind)
    if of is list:
        return given[0] if origin in (list, tuple) and given else Any
    return given[1] if origin is dict and len(given) == 2 else Any
