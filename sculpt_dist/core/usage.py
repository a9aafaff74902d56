"""What this process takes of its machine, as Linux counts it in /proc."""

from __future__ import annotations

import os
import time
from pathlib import Path

COUNTED = {"rchar": "bytes_read", "wchar": "bytes_written", "syscr": "reads", "syscw": "writes"}  # in /proc/self/io


def usage() -> dict[str, float]:
    """CPU seconds so far and, where there is a /proc, `memory_bytes` (resident), `open_files`, `reads` and `bytes_read`
    (calls of the system and what they gave, from the disk or from its cache), `writes` and `bytes_written`.
    """
    return {"cpu_seconds": time.process_time(), **_memory(), **_open_files(), **_traffic()}


def _memory() -> dict[str, float]:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")]
    return {"memory_bytes": sizes[0]} if sizes else {}


def _open_files() -> dict[str, float]:
    folder = "/proc/self/fd"
    return {"open_files": len(os.listdir(folder)) - 1} if os.path.isdir(folder) else {}  # this listing is one


def _traffic() -> dict[str, float]:
    try:
        pairs = [line.split(": ") for line in Path("/proc/self/io").read_text().splitlines()]
    except OSError:  # another system, or a container that hides it
        return {}
    return {COUNTED[name]: int(number) for name, number in pairs if name in COUNTED}
