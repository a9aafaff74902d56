"""Runs a command of sculpt-dist and copies its run folder before everything that it does to a file of it.

Arguments: SNAPSHOTS FOLDER COMMAND... A copy is what a kill at that moment would leave behind.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from sculpt_dist.cli import main as cli

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = "os.rename os.mkdir os.remove os.rmdir os.symlink".split()


def watch(snapshots: Path, folder: Path) -> None:
    """Number the copies from 000 on; each has a note of what was about to happen beside it."""
    one_at_a_time, this_thread = threading.Lock(), threading.local()

    def before(event: str, details: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(details[2], int) and details[2] & WRITING
        if getattr(this_thread, "copies", False) or not (opened or event in CHANGES):
            return
        place = os.fsdecode(details[0]) if isinstance(details[0], (str, bytes, os.PathLike)) else ""
        if not (place.startswith(str(folder)) or (event in CHANGES and not place.startswith("/"))):
            return
        this_thread.copies = True
        try:
            with one_at_a_time:  # another thread's change waits for its own copy
                copy(f"{event} {place.removeprefix(str(folder))}")
        finally:
            this_thread.copies = False

    def copy(note: str) -> None:
        number = f"{len(list(snapshots.glob('*.txt'))):03}"
        unfinished = snapshots / f"{number}.unfinished"  # stays so where the process ends meanwhile
        if folder.exists():
            shutil.copytree(folder, unfinished, symlinks=True)
        (snapshots / f"{number}.txt").write_text(note)
        if unfinished.exists():
            unfinished.rename(snapshots / number)

    sys.addaudithook(before)


if __name__ == "__main__":
    snapshots, folder, *command = sys.argv[1:]
    sys.argv = ["sculpt-dist", *command]
    watch(Path(snapshots), Path(folder))
    cli.main()
