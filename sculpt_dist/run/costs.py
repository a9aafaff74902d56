"""The costs of a run: wall time, CPU time and passes of the net by part; memory; bytes sent.

Times are all that was spent. Passes are counted once: what a kill made the run repeat is not in them, so that a resumed
run has as many as an undisturbed one. Therefore shards, checkpoints and scores record the passes that made them, and a
session starts from their numbers (`set_passes`), not from those of costs.json.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.core.files import read_object, write_record
from sculpt_dist.engine.group import Group

REMEDY = "remove it and repeat the command; costs then count from there on"


@dataclass
class Costs:
    """What the run has cost this rank so far, over all its sessions; kept in costs.json."""

    folder: Path
    group: Group
    backbone: Backbone
    seconds: dict[str, float] = field(
        default_factory=lambda: {"prepare": 0.0, "train": 0.0, "evaluate": 0.0, "total": 0.0}
    )
    cpu_seconds: dict[str, float] = field(default_factory=lambda: {"prepare": 0.0, "train": 0.0, "evaluate": 0.0})
    passes: dict[str, int] = field(
        default_factory=lambda: {"prepare": 0, "train": 0, "evaluate": 0}
    )  # see Backbone.passes
    bytes_communicated: int = 0
    weights: dict[str, int] = field(default_factory=dict)
    _part: str | None = None  # the part that costs are added to now
    _wall: float = field(default_factory=time.monotonic)
    _cpu: float = field(default_factory=time.process_time)
    _sent: int = 0
    _passed: int = 0

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """Add the wall time, CPU time and passes of the block to a part of the costs."""
        self._flush()
        self._part = part
        try:
            yield
        finally:
            self._flush()
            self._part = None

    def read(self) -> None:
        """Continue from the costs.json of earlier sessions, if they had the same number of ranks."""
        file = self.folder / "costs.json"
        before = self.group.on_first(lambda: read_object(file, REMEDY, ("ranks", "of_rank")) if file.exists() else None)
        if before is None or before["ranks"] != self.group.size:
            return
        try:
            costs = before["of_rank"][self.group.rank]
            seconds, cpu_seconds, passes = (
                {part: float(costs[kind][part]) for part in mine}
                for kind, mine in (
                    ("seconds", self.seconds),
                    ("cpu_seconds", self.cpu_seconds),
                    ("passes", self.passes),
                )
            )
            self.bytes_communicated = int(costs["bytes_communicated"])
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise RunFolderError(f"{file} is damaged ({type(error).__name__}: {error}): {REMEDY}") from error
        self.seconds, self.cpu_seconds = seconds, cpu_seconds
        self.passes = {part: int(count) for part, count in passes.items()}

    def set_passes(self, part: str, total: int | None) -> None:
        """Replace the passes of a part on all ranks by what its results record; None: an earlier version made them."""
        self._flush()
        if total is not None:
            self.passes[part] = total if self.group.is_first else 0

    def all_passes(self, part: str) -> int:
        """The passes of a part so far, summed over ranks; all ranks enter."""
        self._flush()
        return sum(self.group.to_all(self.passes[part]))

    def write(self) -> None:
        """Write costs.json; all ranks enter.

        Wall seconds and bytes are the first rank's, CPU seconds and passes are sums, peak memory is listed by rank.
        """
        self._flush()
        costs: dict[str, Any] = {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "passes": self.passes,
            "bytes_communicated": self.bytes_communicated,
        }
        ranks = self.group.to_all(costs | {"peak_memory_bytes": peak_memory(self.group.device)})

        def write() -> None:
            content = {name: ranks[0][name] for name in ("seconds", "bytes_communicated")} | {
                "cpu_seconds": {part: sum(rank["cpu_seconds"][part] for rank in ranks) for part in self.cpu_seconds},
                "passes": {part: sum(rank["passes"][part] for rank in ranks) for part in self.passes},
                "peak_memory_bytes": [rank["peak_memory_bytes"] for rank in ranks],
                "ranks": self.group.size,
                "weights": self.weights,
                "of_rank": ranks,
            }
            write_record(self.folder / "costs.json", content)

        self.group.on_first(write)

    def _flush(self) -> None:
        wall, cpu, sent, passed = (
            time.monotonic(),
            time.process_time(),
            self.group.bytes_communicated(),
            self.backbone.passes,
        )
        self.seconds["total"] += wall - self._wall
        if self._part is not None:
            self.seconds[self._part] += wall - self._wall
            self.cpu_seconds[self._part] += cpu - self._cpu
            self.passes[self._part] += passed - self._passed
        self.bytes_communicated += sent - self._sent
        self._wall, self._cpu, self._sent, self._passed = wall, cpu, sent, passed


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
