"""The context around a run's work: it listens for stop requests and logs the cause of a failure as the last line."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sculpt_dist.core.errors import SculptError, StopRequested
from sculpt_dist.core.files import append_line, writing
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.launch import job_name
from sculpt_dist.engine.stopping.heartbeat import is_lost_connection
from sculpt_dist.engine.stopping.request import CAUSE, LOG_FILE, REQUEUE_FILE, StopRequest


@contextmanager
def watched(group: Group, folder: Path, grace: float, late_after: float | None = None) -> Iterator[StopRequest]:
    """Log when the work begins and ends; after a failure the last line is its cause. All ranks must enter.

    A rank that fails logs its error at once. A rank that only lost its connection first finds out which rank died or
    hangs, and logs that unless another rank has given a cause by then. `late_after`: see StopRequest; on GPUs it is the
    group's time limit, as NCCL gives no chance to log anything after its own.
    """
    log = folder / LOG_FILE
    group.on_first(lambda: _begin(log, group.size))
    if late_after is None and group.device.type == "cuda":
        late_after = group.timeout
    try:
        with StopRequest(group, folder, grace, late_after) as stop:
            try:
                stop.check("the start")
                yield stop
            except StopRequested:  # not a failure
                raise
            except SculptError as error:  # most are raised on all ranks
                stop.failing = True
                stop.log_cause(f"{type(error).__name__}: {error}")
                raise
            except Exception as error:  # whatever it is: logged here, and raised again
                stop.failing = True  # otherwise a launcher's SIGTERM would count as a request to continue later
                if is_lost_connection(error):
                    culprit = stop.heartbeat.culprit()
                    stop.log_cause(f"{culprit}; seen by rank {group.rank}: {_first_line(error)}")
                else:
                    what = f"{type(error).__name__}: {_first_line(error)}"
                    _append(log, f"{CAUSE}rank {group.rank} on {platform.node()}: {what}")
                raise
    except StopRequested as stopped:
        if group.is_first:
            append_line(log, str(stopped))
        raise
    if group.is_first:
        append_line(log, "done")


def _begin(log: Path, ranks: int) -> None:
    job = f", job {job_name()}" if job_name() else ""
    append_line(log, f"began on {ranks} rank(s), {platform.node()}{job}")
    with writing(log):
        (log.parent / REQUEUE_FILE).unlink(missing_ok=True)


def _append(log: Path, text: str) -> None:
    """Log while an error is raised, which may be that the disk is full: nothing hides it."""
    with contextlib.suppress(OSError):
        append_line(log, text)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
