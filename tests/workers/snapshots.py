"""Runs a command of sculpt-dist and copies its run folder before everything that it does to a file of it.

Arguments: SNAPSHOTS FOLDER COMMAND... A copy is what a kill at that moment would leave behind.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from sculpt_dist.cli import main as cli

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = "os.rename os.mkdir os.remove os.rmdir os.symlink".split()


def watch(snapshots: Path, folder: Path) -> None:
    """Number the copies from 000 on; each has a note of what was about to happen beside it."""
    copying = False

    def before(event: str, details: tuple[Any, ...]) -> None:
        nonlocal copying
        opened = event == "open" and isinstance(details[2], int) and details[2] & WRITING
        if copying or not (opened or event in CHANGES):
            return
        place = os.fsdecode(details[0]) if isinstance(details[0], (str, bytes, os.PathLike)) else ""
        if not (place.startswith(str(folder)) or (event in CHANGES and not place.startswith("/"))):
            return
        copying = True
        number = f"{len(list(snapshots.glob('*.txt'))):03}"
        if folder.exists():
            shutil.copytree(folder, snapshots / number, symlinks=True)
        (snapshots / f"{number}.txt").write_text(f"{event} {place.removeprefix(str(folder))}")
        copying = False

    sys.addaudithook(before)


if __name__ == "__main__":
    snapshots, folder, *command = sys.argv[1:]
    sys.argv = ["sculpt-dist", *command]
    watch(Path(snapshots), Path(folder))
    cli.main()
