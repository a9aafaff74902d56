"""What the files of a run folder must hold for a report: the types and ranges of the values that the page reads."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]
Shape = Mapping[str, Any]  # key -> Check, or the Shape of a mapping; a missing or null value always fits

LARGEST = 1e18
MOST_TERMS = 50  # of a loss


def fault(content: Mapping[str, Any], shape: Shape) -> str | None:
    """The first value that does not fit, in words."""
    for key, wanted in shape.items():
        value = content.get(key)
        if value is None:
            continue
        if isinstance(wanted, Mapping) and isinstance(value, dict):
            within = fault(value, wanted)
            if within is not None:
                return f"{key}.{within}"
        elif isinstance(wanted, Mapping) or not wanted(value):
            return f"{key} cannot be {shortened(value)}"
    return None


def shortened(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def is_count(value: Any) -> bool:
    return isinstance(value, int) and is_number(value) and value >= 0


def is_text(value: Any) -> bool:
    """A text without halves of characters, which could not be written."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_share, value))


def is_measured(value: Any) -> bool:
    """A number, or what an overflow leaves."""
    return is_number(value) or (isinstance(value, float) and not math.isfinite(value))


def is_name(value: Any) -> bool:
    return is_text(value) or is_number(value)


def is_target(value: Any) -> bool:
    return isinstance(value, dict) and fault(value, TARGET) is None


def is_concept(value: Any) -> bool:
    return isinstance(value, dict) and value.get("target") is not None and fault(value, CONCEPT) is None


def is_attack(value: Any) -> bool:
    return isinstance(value, dict) and fault(value, ATTACK) is None


def is_shown(value: Any) -> bool:
    return isinstance(value, dict) and all(value.get(key) is not None for key in SHOWN) and fault(value, SHOWN) is None


def each(fits: Check, null: bool = True) -> Check:
    """A mapping in which every value fits, or may be null."""
    return lambda value: (
        isinstance(value, dict)
        and all(map(is_text, value))
        and all(fits(member) or (null and member is None) for member in value.values())
    )


def every(fits: Check) -> Check:
    """A list in which every value fits."""
    return lambda value: isinstance(value, list) and all(map(fits, value))


TARGET: Shape = {
    **dict.fromkeys(("accuracy", "UA", "SA"), is_share),
    **dict.fromkeys(("seen", "images"), is_count),
}
PART: Shape = {
    **dict.fromkeys(("UA", "SA", "IRA", "IRA_near", "IRA_far", "IRA_held", "CRA", "CTA"), is_share),
    **dict.fromkeys(("UA_ci95", "SA_ci95", "IRA_ci95", "IRA_near_ci95", "IRA_far_ci95", "IRA_held_ci95"), is_interval),
    **dict.fromkeys(("CRA_ci95", "CTA_ci95"), is_interval),
    "images": each(is_count, null=False),
    "targets": each(is_target, null=False),
    "objects": each(is_share),
    "styles": each(is_share),
    "extra": each(is_number),
    "made_by": is_text,
    "subset": is_count,
}
RATES: Shape = {
    **dict.fromkeys(("pre", "post", "alone", "mean"), is_share),
    **dict.fromkeys(("cases", "attacked"), is_count),
    "post_ci95": is_interval,
    "passes_to_success": is_number,
    "variants": each(is_share, null=False),
}
ATTACK: Shape = {
    **RATES,
    **dict.fromkeys(("classifier", "witness"), RATES),
    "judged_by": lambda value: value in ("classifier", "witness"),
    "scores": each(is_number, null=False),
    "shown": every(is_shown),
    "counts": lambda value: value in ("best", "mean"),
    "passes": is_number,
}
SHOWN: Shape = {
    "file": lambda value: isinstance(value, str) and re.fullmatch(r"\w+/\d+-\d+\.png", value) is not None,
    "concept": is_text,
    "seen": lambda value: isinstance(value, bool),
}
ATTACKS: Shape = {
    "attacks": lambda value: each(is_attack, null=False)(value),
    "judges": each(is_text),
    **dict.fromkeys(("budget", "checksums"), is_text),
}
SCORES: Shape = {"plain": PART, "paraphrased": PART, "witness": PART, "passes": is_count, "files": each(is_text)}
COSTS: Shape = {
    **dict.fromkeys(("seconds", "cpu_seconds", "passes", "weights"), each(is_number)),
    "peak_memory_bytes": every(is_number),
    "bytes_communicated": is_number,
    "ranks": is_count,
}
MANIFEST: Shape = {"config": is_text, "finished": lambda value: isinstance(value, bool)}
CONCEPT: Shape = {"target": is_name, "superclass": is_name, "kind": is_text}
CONFIG: Shape = {
    "model": {"path": is_text, "arch": is_text},
    "method": {"name": is_text},
    "concepts": every(is_concept),
    **{section: {} for section in ("train", "mask", "engine", "evaluate")},
}
STEP: Shape = {  # a line of metrics.jsonl
    **dict.fromkeys(("concept", "step", "global_step", "steps"), is_count),
    **dict.fromkeys(("loss", "open", "swapped", "overlap"), is_measured),
    "terms": lambda value: each(is_measured)(value) and len(value) <= MOST_TERMS,
    "phase": is_text,
}
