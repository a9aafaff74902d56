"""Reads metrics.jsonl, one line per step, and finds what is damaged or missing in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sculpt_dist.core.files import is_intact, unsealed
from sculpt_dist.report.shapes import STEP, fault

LONGEST = 1 << 16  # bytes of a line; longer ones are not read as a whole


@dataclass(frozen=True)
class Steps:
    """The lines of metrics.jsonl in order of (concept, step), without their checksums; one per step."""

    lines: list[dict[str, Any]]
    num_unreadable: int = 0
    """Lines that a kill cut off, or that hold something else."""
    num_changed: int = 0
    """Lines that differ from their checksum."""
    num_unsealed: int = 0
    """Lines without a checksum, of earlier versions."""
    interval: int = 1
    """Every so many lines of the file were read."""

    @property
    def is_whole(self) -> bool:
        """Whether every line of the file is a step, as it was written."""
        return not (self.num_unreadable or self.num_changed)

    def num_missing(self, num_finished: int, first: int = 0) -> int:
        """How many steps have no line: before the last line, and in the first `num_finished` concepts.

        `first`: the concept with which training began.
        Earlier versions did not write how many steps a concept has; then only gaps between two steps are found.
        """
        if self.interval > 1 or not self.lines:
            return 0
        found: dict[int, int] = {}
        expected: dict[int, int] = {}
        for line in self.lines:
            concept, step = line["concept"], line["step"]
            found[concept] = found.get(concept, 0) + 1
            expected[concept] = max(step + 1, line.get("steps") or 0)
            highest = step + 1
        last = self.lines[-1]["concept"]
        if last >= num_finished:
            expected[last] = highest
        num_concepts = max(last + 1, num_finished) - first
        whole = self.lines[-1].get("steps") or 0
        without_lines = (num_concepts - len(found)) * whole
        return sum(expected[concept] - found[concept] for concept in found) + without_lines


def read_metrics(path: Path, most: int | None = None) -> Steps:
    """The steps of a metrics.jsonl; if a step has two lines, the later one counts.

    Of a file with more than `most` lines, only every second, third and so on is read.
    """
    if not path.is_file():
        return Steps([])
    interval = 1 if most is None else max(1, -(-_count_lines(path) // most))
    lines: dict[tuple[int, int], dict[str, Any]] = {}
    num_unreadable = num_changed = num_unsealed = 0
    for number, text in enumerate(_texts(path)):
        if number % interval or not text.strip():
            continue
        line = _step(text)
        if line is None:  # not only the last line: a resumed run appends after a partial one
            num_unreadable += 1
        elif (intact := is_intact(line)) is False:
            num_changed += 1
        else:
            num_unsealed += intact is None
            lines[line["concept"], line["step"]] = unsealed(line)
    return Steps([lines[key] for key in sorted(lines)], num_unreadable, num_changed, num_unsealed, interval)


def _step(text: bytes) -> dict[str, Any] | None:
    """The content of a line; None where it is not that of a step."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or line.get("concept") is None or line.get("step") is None:
        return None
    return None if fault(line, STEP) else line


def _texts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while text := file.readline(LONGEST):
            yield text


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(LONGEST), b""))


def step_notes(steps: Steps, num_finished: int, first: int = 0) -> list[str]:
    """What a reader of the report should know about its curves."""
    missing = steps.num_missing(num_finished, first) - steps.num_changed
    found = []
    if steps.num_unreadable:
        found.append(f"{_lines(steps.num_unreadable)} of metrics.jsonl cannot be read.")
    if steps.num_changed:
        found.append(f"{_lines(steps.num_changed)} of metrics.jsonl changed after the run, and left out of the curves.")
    if missing > 0:
        found.append(f"metrics.jsonl lacks {missing:,} step{'s' if missing > 1 else ''} of the run.")
    if steps.interval > 1:
        found.append(f"The curves show one in {steps.interval} of the lines of metrics.jsonl.")
    return found


def _lines(number: int) -> str:
    return f"{number:,} line{'s' if number > 1 else ''}"
