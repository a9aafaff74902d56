"""The reference of all configuration keys: type, default and meaning, read from the source of the dataclasses.

A field's meaning is the string beneath it. Reading the source instead of importing the modules keeps commands fast.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sculpt_dist.core.plugins import METHODS, check_plugin, plugins

SCHEMA = Path(__file__).with_name("schema.py")
ROOT = "RunConfig"


@dataclass(frozen=True)
class Key:
    """One key of a configuration."""

    name: str  # dotted, such as train.lr
    type: str
    default: str  # as yaml writes it; empty if the key is required
    meaning: str


def run_keys() -> list[Key]:
    """All keys of a run's configuration except its method's options, in the order of the sections."""
    classes = _classes(SCHEMA)
    return list(_keys(classes, ROOT, ""))


def method_keys(name: str) -> list[Key]:
    """The keys of a method's own options."""
    return list(_keys(_classes(plugin_file(check_plugin(METHODS, name, "method.name"), name)), "Config", "method."))


def attack_keys(name: str) -> list[Key]:
    """The keys of an attack's own options."""
    return list(_keys(_classes(plugin_file("sculpt_dist.attacks", name)), "Config", f"attack.options.{name}."))


def reference(prefix: str = "") -> list[Key]:
    """All keys that start with `prefix`; the options of methods are named method.NAME.key."""
    found = run_keys()
    for name in plugins(METHODS):
        options = [key for key in method_keys(name) if key.name != "method.name"]
        found += [Key(f"method.{name}.{key.name[7:]}", key.type, key.default, key.meaning) for key in options]
    found += [key for name in plugins("sculpt_dist.attacks") for key in attack_keys(name)]
    return [key for key in found if key.name.startswith(prefix)]


def reference_markdown() -> str:
    """The reference as Markdown: a heading and a table for each section."""
    parts: list[str] = []
    sections: dict[str, list[Key]] = {}
    for key in reference():
        words = key.name.split(".")
        section = ".".join(words[:2]) if words[0] == "method" and len(words) > 2 else words[0]
        sections.setdefault(section, []).append(key)
    for section, keys in sections.items():
        rows = [f"| `{key.name}` | {_code(key.type)} | {_code(key.default)} | {_cell(key.meaning)} |" for key in keys]
        heading = f"method: {section[7:]}" if section.startswith("method.") else section
        parts.append("\n".join([f"## {heading}", "", "| key | type | default | meaning |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def summaries(package: str) -> dict[str, str]:
    """Name -> first line of the docstring, for every plugin in a package."""
    found = {}
    for name in plugins(package):
        docstring = ast.get_docstring(ast.parse(plugin_file(package, name).read_text(encoding="utf-8"))) or ""
        found[name] = docstring.split("\n")[0]
    return found


def plugin_file(package: str, name: str) -> Path:
    """The source file of a plugin; imports only the packages that contain it."""
    spec = importlib.util.find_spec(f"{package}.{name}")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def _classes(file: Path) -> dict[str, ast.ClassDef]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _keys(classes: dict[str, ast.ClassDef], name: str, prefix: str) -> Iterator[Key]:
    body = classes[name].body if name in classes else []  # the options of a plugin without any
    for node, after in zip(body, [*body[1:], None]):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        kind, key = ast.unparse(node.annotation), prefix + node.target.id
        meaning = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            meaning = " ".join(after.value.value.split())
        if kind in classes:
            yield from _keys(classes, kind, key + ".")
            continue
        yield Key(key, kind, _default(node.value), meaning)
        inner = kind.removeprefix("list[").removesuffix("]")
        if inner in classes:
            yield from _keys(classes, inner, key + "[].")


def _default(value: ast.expr | None) -> str:
    """A field's default as yaml writes it. A factory gives the value it returns, or its source if that is computed."""
    if value is None or (isinstance(value, ast.Name) and value.id == "MISSING"):
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        value = next(keyword.value for keyword in value.keywords if keyword.arg in ("default_factory", "default"))
        if isinstance(value, ast.Name):
            return {"list": "[]", "dict": "{}"}[value.id]
        if isinstance(value, ast.Lambda):
            value = value.body
    try:
        return json.dumps(ast.literal_eval(value)).strip('"')
    except ValueError:
        return textwrap.shorten(ast.unparse(value), 60, placeholder=" ...")


def _code(text: str) -> str:
    if "|" in text:  # Python-Markdown would show the backslash that escapes it in a table
        return f"<code>{text.replace('|', '&#124;')}</code>"
    return f"`{text}`" if text else "required"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
