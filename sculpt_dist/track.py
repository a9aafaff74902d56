"""What a run says while it runs: metrics.jsonl always, Weights & Biases when asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping

from sculpt_dist.settings import RunConfig


class Tracker:
    """Writes on the first rank; on the others every call does nothing."""

    def __init__(self, config: RunConfig, folder: Path, active: bool) -> None:
        self._file = (folder / "metrics.jsonl").open("a", buffering=1) if active else None
        self._wandb: Any = None
        if active and config.track.wandb:
            import wandb

            self._wandb = wandb.init(project=config.track.project, name=config.track.name, dir=str(folder), config={"run": folder.name})

    def log(self, entry: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self._file is not None:
            self._file.write(json.dumps(dict(entry)) + "\n")
        if self._wandb is not None:
            terms = {f"loss/{name}": value for name, value in entry.get("terms", {}).items()}
            self._wandb.log({key: value for key, value in entry.items() if isinstance(value, (int, float))} | terms)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
