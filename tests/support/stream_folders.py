"""Folders of shards for tests."""

from __future__ import annotations

import torch

from sculpt_dist.data.shards import Sample, write_index, write_shard


def make_stream(folder, count: int, offset: int = 0, size: int = 4):
    folder.mkdir(parents=True)
    records = []
    for start in range(0, count, size):
        ids = range(start, min(start + size, count))
        samples = [Sample(torch.full((1, 2, 2), float(offset + i)), f"prompt {i % 3}", i) for i in ids]
        records.append(write_shard(folder, f"{start:05d}.tar", samples))
    write_index(folder, {"count": count}, records)
    return folder
