"""mkdocs hook: fills in the reference of all configuration keys when the site is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]
MARKER = "<!-- all keys -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the marker line in docs/configuration.md by the keys that the source declares."""
    if MARKER not in markdown:
        return markdown
    if str(PROJECT) not in sys.path:
        sys.path.insert(0, str(PROJECT))
    from sculpt_dist.config.reference import reference_markdown  # not at the top: mkdocs loads hooks by their path

    return markdown.replace(MARKER, reference_markdown())
