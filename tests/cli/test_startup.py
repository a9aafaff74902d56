"""How long the package and the command line take to start, in CPU seconds: the machine may be busy with other work."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from harness import PROJECT, rank_environment

CONFIG = str(PROJECT / "configs" / "canvas" / "dm_cal.yaml")
pytestmark = pytest.mark.two_ranks


def fastest(*arguments: str, code: int = 0, runs: int = 5) -> float:
    """The least CPU seconds that `python ARGUMENTS` took in these runs, each of which exited with `code`."""
    seconds = []
    for _ in range(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *arguments], capture_output=True, env=rank_environment(), timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == code, done.stderr.decode()
    return min(seconds)


def test_the_package_is_imported_within_300_ms():
    assert fastest("-c", "import sculpt_dist") <= 0.3


def test_help_is_printed_within_a_second():
    assert fastest("-m", "sculpt_dist", "--help") < 1.0


def test_a_wrong_key_is_reported_within_700_ms():
    assert fastest("-m", "sculpt_dist", "unlearn", CONFIG, "trian.lr=1", code=2) <= 0.7
