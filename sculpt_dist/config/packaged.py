"""The configurations that come with the program, found by name wherever it is installed."""

from __future__ import annotations

import re
from pathlib import Path

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import write_atomically

PACKAGED = Path(__file__).parents[1] / "configs"  # in a checkout a link
NAMED = re.compile(r"[\w./-]+\.(?:yaml|txt)")  # a file that a configuration builds on


def find_config(file: Path) -> Path:
    """A file as it is given; where there is none, the packaged configuration of that name.

    The name is a path without its ending, such as canvas/dm_cal; `configs/canvas/dm_cal.yaml` stands for it, too.
    """
    return _given_or(file, _place(str(file)))


def find_list(file: Path) -> Path:
    """A list of prompts as given; where there is none, the packaged one of that name, such as gallery/hold.txt."""
    return _given_or(file, _inside(str(file)))


def _given_or(file: Path, packaged: Path) -> Path:
    try:
        return packaged if not file.exists() and packaged.is_file() else file
    except (OSError, ValueError):  # no name that a file can have
        return file


def packaged_configs() -> dict[str, str]:
    """The first line of comment of each packaged configuration, by its name."""
    files = sorted(PACKAGED.glob("**/*.yaml"))
    return {file.relative_to(PACKAGED).with_suffix("").as_posix(): _comment(file) for file in files}


def copy_config(name: str, folder: Path) -> list[Path]:
    """Copy a packaged configuration, and those that it builds on, into a folder; returns the copies.

    Raises ConfigError for an unknown name, and where another file is in the way.
    """
    root = PACKAGED.resolve()
    waiting, copies = [_place(name).resolve()], {}
    if not waiting[0].is_file():
        raise ConfigError(f"{name}: there is no such packaged configuration; `sculpt-dist configs` lists them")
    while waiting:
        source = waiting.pop()
        target = folder / source.relative_to(root)
        if target in copies:
            continue
        content = copies[target] = source.read_bytes()
        if target.exists() and target.read_bytes() != content:
            raise ConfigError(f"{target}: is another file already; name another folder")
        named = NAMED.findall(content.decode())
        others = [place.resolve() for word in named for place in (source.parent / word, _place(word), _inside(word))]
        waiting += [other for other in others if other.is_file() and other.is_relative_to(root)]
    for target, content in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, content)
    return list(copies)


def _place(name: str) -> Path:
    """Where a packaged configuration of this name would be; outside of them there is none."""
    return _inside(f"{name.removesuffix('.yaml')}.yaml")


def _inside(name: str) -> Path:
    inside = Path(name.removeprefix("configs/"))
    return PACKAGED / inside if not inside.is_absolute() and ".." not in inside.parts else PACKAGED / "none"


def _comment(file: Path) -> str:
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
