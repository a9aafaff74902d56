"""Renders the templates of pages and model cards. Only this file imports jinja2."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, filters: Mapping[str, Callable[..., Any]] | None = None, /, **values: Any) -> str:
    """Render a template of templates/. HTML templates escape all values; a missing value is an error.

    `filters` are added to `data_uri`, which inlines the bytes of an image.
    """
    environment = _environment(template.endswith(".html"))
    environment.filters |= filters or {}
    text: str = environment.get_template(template).render(**values)
    return text


@cache
def _environment(escapes: bool) -> Any:
    """One for all calls: it keeps what it has compiled."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=escapes,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"data_uri": data_uri}
    return environment


def data_uri(image: bytes, kind: str = "png") -> str:
    """The image as a URI for `src`."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
