"""Trackers of a run: metrics.jsonl, Weights & Biases, TensorBoard.

`tracker` distributes what a run reports to the trackers; `sinks/` holds one tracker per file. Only `run` imports this.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.track.tracker import Tracker, check_tracking, stage_after

__getattr__, __dir__ = lazy_exports(__name__, {"tracker": ["Tracker", "check_tracking", "stage_after"]})
