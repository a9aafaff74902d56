"""How a run stops: on a signal or a STOP file, together on all ranks, and with the cause in its log when a rank fails.

`request` collects stop requests and lets the ranks agree on them; `heartbeat` tells dead, hung and slow ranks apart;
`watch` is the context that wraps a run's work. Everything that runs on ranks (run, evaluation, bench) imports this.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.engine.stopping.heartbeat import Heartbeat
    from sculpt_dist.engine.stopping.request import LOG_FILE, REQUEUE_FILE, STOP_FILE, StopRequest
    from sculpt_dist.engine.stopping.watch import watched

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "heartbeat": ["Heartbeat"],
        "request": ["LOG_FILE", "REQUEUE_FILE", "STOP_FILE", "StopRequest"],
        "watch": ["watched"],
    },
)
