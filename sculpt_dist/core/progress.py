"""Progress bars: one style, on the first rank only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")


def progress(
    items: Iterable[Item], label: str, shown: bool, start: int = 0, total: int | None = None
) -> Iterator[Item]:
    """Yield the items and, if `shown`, draw a bar on stderr; `start` items were done before.

    `total`: how many there are at most, where the items have no length.
    """
    if not shown:
        yield from items
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        known = len(items) if isinstance(items, Sized) else total
        task = bar.add_task(label, total=None if known is None else start + known, completed=start)
        for item in items:
            yield item
            bar.advance(task)
