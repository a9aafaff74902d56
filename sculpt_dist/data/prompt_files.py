"""Whole prompts from a user's file, such as I2P or the captions of COCO: read as they are, nothing in them is filled in."""

from __future__ import annotations

import csv
import io
import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sculpt_dist.core.errors import ConfigError

Number = TypeVar("Number", int, float)

SEEDS = (
    "seed",
    "evaluation_seed",
    "sd_seed",
)  # the columns that published lists have; the first one that is there counts
GUIDANCES = ("guidance", "evaluation_guidance", "sd_guidance_scale")


@dataclass(frozen=True)
class ListedPrompt:
    """One line of a list; what the file does not say is None."""

    prompt: str  # spaces and line breaks within it are single spaces
    seed: int | None = None  # of the image's noise
    guidance: float | None = None


def read_prompts(file: str | Path) -> tuple[ListedPrompt, ...]:
    """The prompts of a .txt file (one a line) or of a .csv file (column `prompt`; a seed and a guidance where it has such columns).

    Lines without anything are passed over. Raises ConfigError that names the file and the line for what is no UTF-8, control
    characters, a missing column or prompt, too many fields, and a seed or guidance that is no such number.
    """
    path = Path(file).expanduser()
    if path.suffix.lower() not in (".txt", ".csv"):
        raise ConfigError(
            f"{file}: a list of prompts is a .txt file with one prompt a line, or a .csv file with a column prompt"
        )
    if not path.is_file():
        raise ConfigError(f"{file}: there is no such file of prompts")
    text = _read_text(path)
    found = _from_csv(path, text) if path.suffix.lower() == ".csv" else tuple(map(ListedPrompt, _lines(text)))
    if not found:
        raise ConfigError(f"{file}: holds no prompt")
    return found


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line}: is no UTF-8 (byte {content[error.start]:#04x}): save the file as UTF-8"
        ) from error
    for number, line in enumerate(text.split("\n"), start=1):
        strange = next(
            (letter for letter in line if unicodedata.category(letter) == "Cc" and letter not in "\t\r"), None
        )
        if strange is not None:
            raise ConfigError(f"{path}, line {number}: holds the control character U+{ord(strange):04X}: remove it")
    return text


def _lines(text: str) -> list[str]:
    return [prompt for line in text.split("\n") if (prompt := " ".join(line.split()))]


def _from_csv(path: Path, text: str) -> tuple[ListedPrompt, ...]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    found, read = [], 0  # read: lines, up to the last whole row
    try:
        columns = [column.strip() for column in rows.fieldnames or ()]
        if "prompt" not in columns:
            raise ConfigError(f"{path}, line 1: has no column prompt; there are: {', '.join(columns) or 'none'}")
        rows.fieldnames, read = columns, 1
        seed, guidance = (next((name for name in names if name in columns), "") for names in (SEEDS, GUIDANCES))
        for row in rows:
            read = rows.reader.line_num  # DictReader's own forgets the empty lines that it passes over
            where = f"{path}, line {read}"
            if None in row:
                raise ConfigError(
                    f"{where}: has more fields than the {len(columns)} columns: put a prompt with commas into double quotes"
                )
            prompt = " ".join((row["prompt"] or "").split())
            if not prompt:
                raise ConfigError(f"{where}: the prompt is empty: remove the line")
            found.append(
                ListedPrompt(
                    prompt,
                    _number(where, seed, row.get(seed), int, 2**63),
                    _number(where, guidance, row.get(guidance), float, math.inf),
                )
            )
    except csv.Error as error:
        raise ConfigError(
            f"{path}, line {read + 1}: is no csv ({error}): write a double quote within a prompt as two"
        ) from error
    return tuple(found)


def _number(where: str, column: str, text: str | None, kind: Callable[[str], Number], end: float) -> Number | None:
    """None where nothing is said. Raises ConfigError for what is no number of this kind from 0 to below `end`."""
    if text is None or not text.strip():
        return None
    try:
        value = kind(text)
    except ValueError:
        value = kind("-1")
    if not 0 <= value < end:
        raise ConfigError(f"{where}: {column}={text.strip()!r} is no {'whole ' if kind is int else ''}number from 0 on")
    return value
