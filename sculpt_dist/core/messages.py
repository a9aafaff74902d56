"""What an error says of values from outside: one line of readable length, without passwords."""

from __future__ import annotations

import re
from collections.abc import Sequence

MOST_OF_A_VALUE, MOST, KEPT_AT_THE_END = 200, 1200, 300
PASSWORD = re.compile(r"(?<=://)[^\s/@'\"]+@")  # user:password@ of an address
_hidden: dict[str, str] = {}  # value of an environment variable -> the text of the configuration that names it


def shown(value: object) -> str:
    """A value as messages show it: its first 200 characters."""
    text = str(value)
    return text if len(text) <= MOST_OF_A_VALUE else f"{text[:MOST_OF_A_VALUE]}..."


def shortlist(names: Sequence[str], most: int = 8) -> list[str]:
    """The names; of more than `most` the first ones, and how many more."""
    return list(names) if len(names) <= most else [*names[: most - 2], f"{len(names) - most + 2:,} more"]


def hide(value: str, text: str) -> None:
    """From now on, show `text`, such as ${oc.env:NAME}, in place of this value."""
    if value:
        _hidden[value] = text


def redacted(text: str) -> str:
    """A text without the users and passwords of addresses, and without values of environment variables."""
    for value in sorted(_hidden, key=len, reverse=True):
        text = text.replace(value, _hidden[value])
    return PASSWORD.sub("***@", text)


def one_line(message: str) -> str:
    """A message without line breaks and characters that a terminal would act on, cut in its middle if it is long."""
    text = redacted(" ".join(message.split("\n")))
    text = "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)
    return text if len(text) <= MOST else f"{text[: MOST - KEPT_AT_THE_END]} ... {text[-KEPT_AT_THE_END:]}"
