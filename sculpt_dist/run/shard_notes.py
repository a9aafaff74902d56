"""The notes beside the shards of a source: what made each of them, and that it is whole.

A note is written with its shard, so a kill loses one at most. The index is written when all shards are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sculpt_dist.core.errors import ShardError
from sculpt_dist.core.files import write_atomically
from sculpt_dist.data.shards import ShardRecord, damage, read_index, write_index
from sculpt_dist.run.owned import is_shard


def is_indexed(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether the index on disk is of this recipe, and all of its shards are whole."""
    if not (folder / "index.json").is_file():
        return False
    try:
        found, records = read_index(folder)
    except ShardError:
        return False
    whole = whole_shards(folder, recipe)
    return found == recipe and records == [whole[first] for first in sorted(whole)]


def write_note(folder: Path, record: ShardRecord, recipe: Mapping[str, Any], passes: int) -> None:
    """Note that a shard is whole, what made it, and how many passes it took."""
    note = {"recipe": recipe, "record": asdict(record), "passes": passes}
    write_atomically(folder / f".{record.name}.json", json.dumps(note).encode())


def whole_shards(folder: Path, recipe: Mapping[str, Any]) -> dict[int, ShardRecord]:
    """First sample id -> record, of the undamaged shards that were made by this recipe."""
    records = [record for record, _ in _notes(folder, recipe)]
    return {record.first: record for record in records if damage(folder, record) is None}


def drawn_passes(folder: Path, recipe: Mapping[str, Any]) -> int | None:
    """The passes that the shards of this recipe took; None if an earlier version drew one of them."""
    counts = [passes for _, passes in _notes(folder, recipe)]
    return None if None in counts else sum(count or 0 for count in counts)


def _notes(folder: Path, recipe: Mapping[str, Any]) -> Iterator[tuple[ShardRecord, int | None]]:
    for note in sorted(folder.glob(".*.tar.json")):
        try:
            content = json.loads(note.read_bytes())
            record, passes = ShardRecord(**content["record"]), content.get("passes")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if content["recipe"] == recipe:
            yield record, passes


def index_shards(folder: Path, recipe: Mapping[str, Any], starts: Sequence[int]) -> None:
    """Index the shards and remove stray files. Raises ShardError when shards of other ranks are missing."""
    records = whole_shards(folder, recipe)
    missing = [start for start in starts if start not in records]
    if missing:
        raise ShardError(f"{folder}: shards at samples {missing} are missing; call prepare again")
    known = {record.name for record in records.values()}
    for stray in folder.glob("*.tar"):
        if stray.name not in known and is_shard(stray):
            stray.unlink()
    write_index(folder, recipe, records.values())
