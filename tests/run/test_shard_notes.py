"""The notes beside shards: which are whole, and how many passes they took."""

from __future__ import annotations

from pathlib import Path

import torch

from sculpt_dist.data.shards import Sample, write_shard
from sculpt_dist.run.shard_notes import drawn_passes, whole_shards, write_note


def test_the_passes_of_a_source_are_those_of_its_present_shards_each_once(tmp_path: Path) -> None:
    recipe, other = {"seed": 0}, {"seed": 1}
    records = [
        write_shard(tmp_path, f"{i:05d}.tar", [Sample(torch.zeros(1, 2, 2), "a photo of a cat", i, None)])
        for i in range(3)
    ]
    for record, made_by in zip(records, (recipe, recipe, other)):
        write_note(tmp_path, record, made_by, 8)
    assert drawn_passes(tmp_path, recipe) == 16 and drawn_passes(tmp_path, other) == 8
    write_note(tmp_path, records[2], recipe, 8)  # drawn again, for another run
    write_note(tmp_path, records[2], recipe, 8)
    assert drawn_passes(tmp_path, recipe) == 24 and len(whole_shards(tmp_path, recipe)) == 3
    note = tmp_path / ".00000.tar.json"
    note.write_text(note.read_text().replace(', "passes": 8', ""))
    assert drawn_passes(tmp_path, recipe) is None, "an earlier version wrote it"
