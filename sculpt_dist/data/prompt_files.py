"""Lists of whole prompts from the user's files, such as I2P or the captions of COCO. Nothing in them is a template."""

from __future__ import annotations

import csv
import io
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sculpt_dist.config.packaged import find_list
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.messages import shown
from sculpt_dist.data.remote import is_remote, local_copy

Number = TypeVar("Number", int, float)

# Column names of published lists; the first one that exists counts.
SEEDS = ("seed", "evaluation_seed", "sd_seed")
GUIDANCES = ("guidance", "evaluation_guidance", "sd_guidance_scale")


@dataclass(frozen=True)
class ListedPrompt:
    """One prompt of a list; None stands for values that the file does not give."""

    prompt: str
    """The prompt, every run of spaces and line breaks replaced by one space."""
    seed: int | None = None
    """Seed of the image's noise."""
    guidance: float | None = None
    """Scale of classifier-free guidance."""


def read_prompts(file: str | Path) -> tuple[ListedPrompt, ...]:
    """Read a .txt file with one prompt per line, or a .csv file with a column `prompt`, optionally seeds and guidances.

    `file` may be a URL, or the name of a packaged list. Empty lines are skipped. Raises ConfigError with the file and
    line for text that is not UTF-8, control characters, a missing column or prompt, too many fields, and an invalid
    seed or guidance.
    """
    named = shown(file)
    try:
        path = local_copy(str(file)) if is_remote(file) else find_list(Path(file).expanduser())
        exists = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, an unknown user
        raise ConfigError(f"{named}: is no file that can be read ({shown(error)})") from error
    if path.suffix.lower() not in (".txt", ".csv"):
        raise ConfigError(
            f"{named}: a list of prompts must be a .txt file, one prompt per line, or a .csv file with a column prompt"
        )
    if not exists:
        raise ConfigError(f"{named}: this list of prompts does not exist")
    text = _read_text(path)
    found = _from_csv(path, text) if path.suffix.lower() == ".csv" else tuple(map(ListedPrompt, _lines(text)))
    if not found:
        raise ConfigError(f"{file}: contains no prompts")
    return found


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = re.sub("\r\n?|[\x85\u2028\u2029]", "\n", content.decode("utf-8-sig"))  # every way to end a line
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {number}: is not UTF-8 (byte {content[error.start]:#04x}): save the file as UTF-8"
        ) from error
    for number, line in enumerate(text.split("\n"), start=1):
        control = next((c for c in line if unicodedata.category(c) == "Cc" and c != "\t"), None)
        if control is not None:
            raise ConfigError(f"{path}, line {number}: contains the control character U+{ord(control):04X}: remove it")
    return text


def _lines(text: str) -> list[str]:
    return [prompt for line in text.split("\n") if (prompt := " ".join(line.split()))]


def _from_csv(path: Path, text: str) -> tuple[ListedPrompt, ...]:
    header = text.partition("\n")[0]
    delimiter = next((mark for mark in ",;\t" if "prompt" in _columns(header.split(mark))), ",")
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    found, num_read = [], 0  # num_read: number of lines up to the end of the last whole row
    try:
        columns = _columns(rows.fieldnames or ())
        if "prompt" not in columns:
            raise ConfigError(
                f"{path}, line 1: has no column prompt; its columns are: {shown(', '.join(columns)) or 'none'}"
            )
        rows.fieldnames, num_read = columns, 1
        seed, guidance = (next((name for name in names if name in columns), "") for names in (SEEDS, GUIDANCES))
        for row in rows:
            num_read = rows.reader.line_num  # DictReader's own line_num omits the empty lines that it skips
            where = f"{path}, line {num_read}"
            if None in row:
                raise ConfigError(
                    f"{where}: has more fields than the {len(columns)} columns: "
                    "put a prompt with commas into double quotes"
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
            f"{path}, line {num_read + 1}: is not valid csv ({error}): write a double quote within a prompt as two"
        ) from error
    return tuple(found)


def _columns(names: Sequence[str]) -> list[str]:
    return [name.strip().strip('"').casefold() for name in names]


def _number(where: str, column: str, text: str | None, kind: Callable[[str], Number], end: float) -> Number | None:
    """The number of a field, None if the field is empty. Raises ConfigError unless it is from 0 to below `end`."""
    if text is None or not text.strip():
        return None
    try:
        value = kind(re.sub(r"(?<=\d)\.0*\s*$", "", text) if kind is int else text)  # spreadsheets write 1234.0
    except ValueError:
        value = kind("-1")
    if not 0 <= value < end:
        expected = "an integer from 0 to 2**63 - 1" if kind is int else "a finite number of 0 or more"
        raise ConfigError(f"{where}: {column}={shown(text.strip())!r} is not {expected}")
    return value
