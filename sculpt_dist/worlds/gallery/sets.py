"""Reads six icon sets and renders the gallery's pictures from them. Only building the gallery needs this.

A set is an unpacked npm package `@iconify-json/<name>`: `icons.json` holds SVG bodies by name, `package.json` its
version (https://iconify.design/docs/types/iconify-json.html). Nothing is fetched here.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import file_sha256, text_sha256
from sculpt_dist.worlds.gallery.world import EMOJI, WORLD

SHEET = 128  # pixels; pictures are rendered at this size, and scaled down when they are augmented


@dataclass(frozen=True)
class Source:
    """Where a style comes from."""

    package: str  # npm: @iconify-json/<package>
    version: str  # with which the shipped models were trained
    licence: str  # SPDX
    author: str
    url: str


SOURCES: dict[str, Source] = {
    "noto": Source("noto", "1.2.9", "Apache-2.0", "Google", "https://github.com/googlefonts/noto-emoji"),
    "blob": Source("noto-v1", "1.2.5", "Apache-2.0", "Google", "https://github.com/googlefonts/noto-emoji"),
    "twemoji": Source("twemoji", "1.2.5", "CC-BY-4.0", "Twitter", "https://github.com/jdecked/twemoji"),
    "fluent": Source("fluent-emoji", "1.2.7", "MIT", "Microsoft", "https://github.com/microsoft/fluentui-emoji"),
    "flat": Source("fluent-emoji-flat", "1.2.6", "MIT", "Microsoft", "https://github.com/microsoft/fluentui-emoji"),
    "emojione": Source("emojione", "1.2.3", "CC-BY-4.0", "EmojiOne", "https://github.com/EmojiTwo/emojitwo"),
}
assert tuple(SOURCES) == WORLD.styles


def render_pictures(folder: Path) -> np.ndarray:
    """All pictures on white, uint8 [objects, styles, 128, 128, 3], from the unpacked packages in `folder`.

    Raises ConfigError that names every missing package and icon, or when resvg-py is not installed.
    """
    sets = read_sets(folder)
    lacking = [
        f"{style}: {emoji_name(name)}"
        for name in WORLD.objects
        for style, icons in sets.items()
        if find_icon(icons, emoji_name(name)) is None
    ]
    if lacking:
        versions = ", ".join(f"{source.package} {source.version}" for source in SOURCES.values())
        raise ConfigError(
            f"--sets {folder}: {len(lacking)} icons are missing: {', '.join(lacking[:8])}"
            f"{' ...' if len(lacking) > 8 else ''}. Unpack the versions that are known to have them: {versions}"
        )
    rows = [
        [_render(icons, find_icon(icons, emoji_name(name)), folder) for icons in sets.values()]
        for name in track(WORLD.objects, description="pictures")
    ]
    return np.array(rows)


def emoji_name(name: str) -> str:
    """The name that the icon sets give an object of the gallery."""
    return EMOJI.get(name, name)


def read_sets(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Style -> its icons.json. Raises ConfigError that names every package that is missing or damaged."""
    found: dict[str, Mapping[str, Any]] = {}
    wrong = []
    for style, source in SOURCES.items():
        file = folder / source.package / "icons.json"
        try:
            found[style] = json.loads(file.read_text("utf-8"))
            if not isinstance(found[style]["icons"], dict):
                raise TypeError("icons is no mapping")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            wrong.append(f"{source.package} ({type(error).__name__})")
    if wrong:
        packages = " ".join(f"@iconify-json/{source.package}@{source.version}" for source in SOURCES.values())
        raise ConfigError(
            f"--sets {folder}: no readable icons.json of {', '.join(wrong)}. Fetch the six packages with "
            f"`npm pack {packages}`, and unpack each into a folder of its name there"
        )
    return found


def checksum(folder: Path) -> str:
    """Over the names of the gallery and the six sets of icons; of what is missing, over its absence."""
    files = [folder / source.package / "icons.json" for source in SOURCES.values()]
    found = [file_sha256(file) if file.is_file() else None for file in files]
    return text_sha256(f"{WORLD.objects} {EMOJI} {found}")


def other_versions(folder: Path) -> list[str]:
    """What differs from the versions with which the shipped models were trained, as `package found, not wanted`."""
    differing = []
    for source in SOURCES.values():
        try:
            version = json.loads((folder / source.package / "package.json").read_text("utf-8"))["version"]
        except (OSError, ValueError, KeyError, TypeError):
            version = "of unknown version"
        if version != source.version:
            differing.append(f"{source.package} {version}, not {source.version}")
    return differing


def find_icon(icons: Mapping[str, Any], emoji: str) -> Mapping[str, Any] | None:
    """An icon by its name, by its name with -face behind it, or by an alias of either."""
    for name in (emoji, f"{emoji}-face"):
        for _ in range(8):  # an alias may name an alias
            name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        if name in icons["icons"]:
            return icons["icons"][name]
    return None


def _render(icons: Mapping[str, Any], icon: Mapping[str, Any] | None, folder: Path) -> np.ndarray:
    """One icon on white, uint8 [128, 128, 3]."""
    try:
        import resvg_py
    except ImportError as error:
        raise ConfigError("the gallery's pictures are rendered by resvg: pip install resvg-py") from error

    if icon is None or not isinstance(icon.get("body"), str):
        raise ConfigError(f"--sets {folder}: an icon has no picture; unpack the packages again")
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in zip(("left", "top", "width", "height"), (0, 0, 16, 16))
    )
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{SHEET}" height="{SHEET}">{icon["body"]}</svg>'
    )
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SHEET, height=SHEET))))
    sheet = Image.new("RGBA", image.size, (255, 255, 255, 255))
    sheet.alpha_composite(image.convert("RGBA"))
    return np.asarray(sheet.convert("RGB"))
