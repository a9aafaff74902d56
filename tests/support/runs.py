"""Runs as processes: started, watched and stopped from a test."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from harness import Ranks, rank_command, rank_environment

LONGER = ["train.steps=30", "evaluate.enabled=false", "train.checkpoint_every=0.2", "train.checkpoint_share=1"]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def passes(folder: Path) -> dict[str, int]:
    """Samples through the net by part of the run, from costs.json."""
    found: dict[str, int] = json.loads((folder / "costs.json").read_text())["passes"]
    return found


def bytes_read() -> int:
    """By system calls of this process so far; what is mapped into memory does not count."""
    return int(Path("/proc/self/io").read_text().split()[1])


def start(arguments: list[str], ranks: int = 2) -> subprocess.Popen:
    command = rank_command(ranks, "-m", "sculpt_dist", *arguments)
    return subprocess.Popen(
        command,
        env=rank_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(folder: Path, process: subprocess.Popen | Ranks, concept: int, step: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").is_file():
            text = (folder / "metrics.jsonl").read_text()
            if f'"concept": {concept}' in text and any(
                (e["concept"], e["step"]) >= (concept, step) for e in map(json.loads, text.splitlines()[:-1])
            ):
                return
        time.sleep(0.05)  # polling another process, not guarding against a race of ours
    raise AssertionError(f"never came to concept {concept}, step {step}")
