"""A minimal job in which one rank misbehaves at its third step.

Arguments: FAULT FOLDER [TIMEOUT [RANK [LATE_AFTER]]]; RANK is 1 if not given.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import torch

from sculpt_dist.cli import main as cli
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.watch import watched


def misbehave(fault: str) -> None:
    if fault == "raises":
        raise KeyError("the true cause")
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "hangs":
        time.sleep(60)
    if fault == "exits":
        os._exit(0)


def main(fault: str, folder: Path, timeout: str = "60", wrong: str = "1", late_after: str = "") -> None:
    if fault == "jumps":
        steady, days = time.time, itertools.cycle([0, 86400, -86400])
        time.time = lambda: steady() + next(days)
    group = Group(float(timeout), f"fault {fault}")
    with watched(group, folder, 30.0, float(late_after) if late_after else None) as stop:
        for step in range(1200 if fault == "none" else 4):
            if step == 2:
                (folder / f"step-{group.rank}").touch()
                if group.rank == int(wrong):
                    misbehave(fault)
                elif fault == "raises" and late_after:
                    time.sleep(60)  # busy outside of any collective
                if fault == "works":
                    (group.on_first if wrong == "0" else group.together)(lambda: time.sleep(8 * (not group.rank)))
            before = time.monotonic()
            group.sum(torch.ones(1))
            if fault == "waits" and step == 2 and group.rank == int(wrong):
                time.sleep(4)  # the others wait in the next collective meanwhile
            if fault == "none":
                time.sleep(0.1)
            stop.check(f"step {step}, after {time.monotonic() - before:.1f} s")


if __name__ == "__main__":
    sys.argv, arguments = sys.argv[:1], sys.argv[1:]
    cli.run_command = lambda: main(arguments[0], Path(arguments[1]), *arguments[2:])
    cli.main()
