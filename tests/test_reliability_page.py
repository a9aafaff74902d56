"""The page of faults names tests that exist."""

from __future__ import annotations

import re

from harness import PROJECT


def test_every_test_on_the_page_exists():
    page = (PROJECT / "docs" / "reliability.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|") and not line.startswith(("|---", "| fault"))]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row.rstrip("| ").rpartition("|")[2])]
    written = " ".join(
        re.findall(r"def (test_\w+)", "".join(p.read_text() for p in PROJECT.rglob("tests/**/test_*.py")))
    )
    assert len(rows) >= 60 and len(named) >= len(rows)
    for name in named:
        assert (PROJECT / name).exists() if name.startswith("tests/") else f"_{name}" in written, name
