"""The frame of a run's work: listens for stop requests, and leaves the cause of a failure as the last line of the run's log."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sculpt_dist.core.errors import SculptError, StopRequested
from sculpt_dist.core.files import append_line
from sculpt_dist.engine.group import Group, job_name
from sculpt_dist.engine.stopping.heartbeat import is_lost_connection
from sculpt_dist.engine.stopping.request import CAUSE, LOG_FILE, REQUEUE_FILE, StopRequest


@contextmanager
def watched(group: Group, folder: Path, grace: float) -> Iterator[StopRequest]:
    """All ranks enter. The run's log gets a line when the work begins and one when it ends; of a failure the last one is the cause.

    A rank that fails says why at once. One that only lost its connection waits for such a word, and when none comes it finds out
    which rank died or hangs.
    """
    log = folder / LOG_FILE
    if group.is_first:
        append_line(
            log, f"began on {group.size} rank(s), {platform.node()}" + (f", job {job_name()}" if job_name() else "")
        )
        (folder / REQUEUE_FILE).unlink(missing_ok=True)
    group.barrier()
    began = log.stat().st_size
    try:
        with StopRequest(group, folder, grace) as stop:
            try:
                stop.check("the start")
                yield stop
            except StopRequested:  # no failure
                raise
            except SculptError as error:  # most are the same on all ranks
                _say_cause(log, began, f"{type(error).__name__}: {error}")
                raise
            except Exception as error:
                stop.failing = True  # or a launcher's SIGTERM would be taken for a wish to go on later
                if is_lost_connection(error):
                    culprit = stop.heartbeat.culprit()
                    _say_cause(log, began, f"{culprit}; seen by rank {group.rank}: {_first_line(error)}")
                else:
                    append_line(
                        log,
                        f"{CAUSE}rank {group.rank} on {platform.node()}: {type(error).__name__}: {_first_line(error)}",
                    )
                raise
    except StopRequested as stopped:
        if group.is_first:
            append_line(log, str(stopped))
        raise
    if group.is_first:
        append_line(log, "done")


def _say_cause(log: Path, began: int, cause: str) -> None:
    """Add a cause unless another rank has given one since the run began."""
    with log.open("rb") as file:
        file.seek(began)
        if CAUSE.encode() not in file.read():
            append_line(log, CAUSE + cause)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
