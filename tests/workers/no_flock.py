"""The command line on a file system without flock: `no_flock.py ARGUMENTS`."""

from __future__ import annotations

import errno
import fcntl
import os

from sculpt_dist.cli.main import main
from sculpt_dist.core import locks


def refuse(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


fcntl.flock = refuse
locks.BEAT, locks.PATIENCE, locks.SETTLE = 0.1, 3.0, 0.3
main()
